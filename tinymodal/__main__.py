"""``python -m tinymodal`` is ``tinymodal``; ``torchrun -m tinymodal`` works too."""

import sys

from tinymodal.cli import main

if __name__ == "__main__":
    sys.exit(main())

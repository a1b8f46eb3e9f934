"""A process can be told to keep the memory it frees."""

import subprocess
import sys


def test_memory_can_be_held():
    told = subprocess.run(
        [sys.executable, "-c", "from tinymodal.core.memory import hold_memory; print(hold_memory())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == str(sys.platform == "linux")

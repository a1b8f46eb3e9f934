"""The errors a user can cause. Each is one line: where, what was found, what was expected, what to do.

The command line prints them without a traceback and exits with 1; anything else is a bug and exits with 2.
"""


class TinyModalError(Exception):
    """Something the user can put right."""


class RecipeError(TinyModalError):
    """A recipe cannot be read or contradicts itself; names the file and the key."""


class DataError(TinyModalError):
    """A row or a file of data is not usable; names the file and the row."""


class CheckpointError(TinyModalError):
    """A folder does not hold the model, tower or run it was named as."""


class ExportError(TinyModalError):
    """What a model cannot be exported to, or what an export does not compute as it should; names the part."""

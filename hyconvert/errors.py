"""Errors that a user can cause and can put right.

The command line turns a `HyconvertError` into one line on stderr and exit code 2. Every other exception is a bug
and shows its traceback.
"""


class HyconvertError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence or two: what is wrong, with the value and the place it stands in, and what to do.
    """


class CheckpointError(HyconvertError):
    """A checkpoint cannot be read, or the converted one cannot be written."""


class UnsupportedModelError(HyconvertError):
    """The checkpoint is sound, but hyconvert cannot convert a model of its kind."""


class PlanError(HyconvertError):
    """A plan, or an option that describes one, does not fit the model or contradicts itself."""


class DataError(HyconvertError):
    """Calibration, training or evaluation text is missing, empty or unreadable."""


class RecipeError(HyconvertError):
    """A recipe, or an option that stands for a line of one, is not valid or does not fit the model."""


class HealError(HyconvertError):
    """Healing cannot start, go on or resume."""

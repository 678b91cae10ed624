"""Exceptions of gigamil: each says what is wrong, where, why, and what to type; each is also a builtin type.

`exit_code` is what the command line returns for it (see the table in the README): 2 usage, 3 some slides failed,
4 environment, 5 interrupted and resumable, 6 training failed.
"""


class GigamilError(Exception):
    """Base class: catching it catches every error that gigamil raises on purpose.

    Attributes:
        is_agreed: all ranks raise it, so that one of them tells it.
    """

    exit_code = 1
    is_agreed = False


class ConfigError(GigamilError, ValueError):
    """The YAML, or a value on the command line, is wrong."""

    exit_code = 2


class CohortError(GigamilError, ValueError):
    """The slide table or the split is wrong; the message lists every problem at once."""

    exit_code = 2


class SlideError(GigamilError, OSError):
    """One slide file cannot be used; the other slides go on."""

    exit_code = 3


class ShardError(GigamilError, OSError):
    """A shard, its index or its manifest is missing, damaged or stale."""

    exit_code = 3


class BagError(GigamilError, ValueError):
    """A bag cannot be pooled (for example a slide without a tile)."""

    exit_code = 6


class EnvironmentFault(GigamilError, RuntimeError):
    """The machine is not fit: a library, a launcher variable, a locked or full folder."""

    exit_code = 4


class CheckpointError(GigamilError, OSError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""

    exit_code = 6


class TrainingError(GigamilError, RuntimeError):
    """Training cannot go on (non-finite losses in a row, a rank that raised)."""

    exit_code = 6
    is_agreed = True


class Interrupted(GigamilError, RuntimeError):
    """Asked to stop by a signal; a checkpoint was committed and the same command continues."""

    exit_code = 5
    is_agreed = True

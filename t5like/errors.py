"""What a user can do about a failure, as exception types; `main` turns each into one line and its exit code.

Everything else that escapes is a bug of ours (exit code 70). Messages follow one form: field, value, rule, and a value
that would work, for example ``data.batch_size=100 must be a multiple of 8 (data 2 x fsdp 4); use 96 or 104``.
"""


class UserError(Exception):
    """A failure that the user can mend; its message is one line."""

    exit_code = 2


class ConfigError(UserError):
    """A wrong command line or config."""

    exit_code = 2


class DataError(UserError):
    """Missing, malformed or changed data, or a tokenizer that does not fit."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that can't be read or written, or storage that fails."""

    exit_code = 4


class Diverged(UserError):
    """The loss or the gradient stopped being finite; starting again would repeat it."""

    exit_code = 5


class Preempted(UserError):
    """The run was told to stop, has saved its state, and should be queued again."""

    exit_code = 75


class PeerLost(UserError):
    """Another process of the run died, hangs or never came; all of them should be started again."""

    exit_code = 76

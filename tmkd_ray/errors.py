"""Errors that a person can mend. The command line prints them without a traceback and exits with 2."""


class UserError(ValueError):
    """Something the user gave is wrong: the message says what, where, and what to do."""


class ConfigError(UserError):
    """The configuration has errors; the message lists every one by its dotted path."""


class UnreadableImageError(UserError):
    """One image cannot be decoded; the message is the reason. The image is set aside, not the run."""


class KnowledgeMismatchError(UserError):
    """A knowledge store belongs to another configuration; the message names the differences."""

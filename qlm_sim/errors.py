"""The error that a user can mend."""


class InputError(Exception):
    """Bad input. The message is one line: where, what was found, what would be right."""

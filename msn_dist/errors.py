"""The one error a user is meant to see."""


class InputError(ValueError):
    """Something the user gave is wrong: a config key, a column, a file, a world size.

    The message holds the value, the place and the fix.  The command line prints it without a
    traceback and exits with code 2, on every rank.
    """

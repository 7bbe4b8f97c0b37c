"""The errors that a user is meant to see; the command line prints their message without a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: a config key, a column, a file, a world size.

    The message holds the value, the place and the fix.  The command line exits with code 2, on every rank.
    """


class Diverged(RuntimeError):
    """What the model computes is NaN or infinite; raised on every rank.  The command line exits with code 1."""


class PeerLost(RuntimeError):
    """Another rank has died, or did not come to a collective.

    The message is this rank's flight record (`msn_dist.sharding.flight_record`): which exchange, what it carried, who
    is missing.  The command line exits with code 4.
    """

"""Faults that the command line reports in one line; kept apart so that they load without torch."""


class PeerFailed(RuntimeError):
    """Another rank failed, died or sent no heartbeat for too long."""

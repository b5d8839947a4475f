"""The exceptions that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; the message is one readable line naming the thing and the mend.

    The command line prints the message without a traceback and exits with ``status``.
    """

    status = 2


class Stopped(UserError):
    """A run that its guards ended before its time; what it wrote is whole."""

    status = 3

"""The one exception that a user's mistake may raise."""


class PgolfError(Exception):
    """A problem the user can mend: one line that says what is wrong, where, and what to do.

    The command line prints the message and exits with code 2; nothing else is caught there.
    """

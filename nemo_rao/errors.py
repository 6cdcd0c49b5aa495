"""The errors that speak to users. Everything else that raises is a mistake of ours."""


class UserError(ValueError):
    """Input that cannot be used: one line that names the place (file, row or key) and the remedy.

    Entry points print the line and exit with code 2, before anything heavy starts.
    """


class RankFailure(RuntimeError):
    """A rank of a run died. The message is what to show: its traceback, or the signal that killed it."""

"""The one error that speaks to users. Everything else that raises is a mistake of ours."""


class UserError(ValueError):
    """Input that cannot be used: one line that names the place (file, row or key) and the remedy.

    Entry points print the line and exit with code 2, before anything heavy starts.
    """

"""What a user got wrong, told so that they can mend it."""


class UserError(ValueError):
    """A mistake in the user's data, configuration or files.

    The message is one line: what was wrong, where, and what to do. The command line prints it alone and
    exits with 2; any other exception is a bug of ours and keeps its traceback.
    """

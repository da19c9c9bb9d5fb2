"""A user's mistakes, and what an exception came from."""

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake in the user's data, configuration or files.

    The message is one line: what was wrong, where, and what to do. The command line prints it alone and
    exits with 2; any other exception is a bug of ours and ends in a crash report.
    """


class UnknownSetting(UserError):
    """A setting that a command doesn't have. The command line adds what it may be called here."""

    def __init__(self, name: str, command: str) -> None:
        super().__init__(f"there is no setting {name}: see sft {command} --cfg job")
        self.name = name


class BadRow(UserError):
    """A row of the data that can't be trained on. It is counted under its reason, and ends nothing by itself."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(why or reason.replace("_", " "))
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:  # of two arguments, unlike its base's
        return BadRow, (self.reason, str(self))


class NotFinite(UserError):
    """The loss or the gradient of a step is infinite or not a number."""


def chain(error: BaseException) -> list[BaseException]:
    """An exception and its causes, newest first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def disk_is_full(error: BaseException) -> bool:
    # safetensors reports the system's error as text only.
    return (isinstance(error, OSError) and error.errno in FULL_DISK) or "No space left on device" in str(error)


def by_hand(error: BaseException) -> bool:
    """Whether the error comes from Ctrl-C; Lightning makes an exit of it."""
    return any(isinstance(link, KeyboardInterrupt) for link in chain(error))

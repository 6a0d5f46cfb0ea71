"""The one error that bad data raises: a single line that says what, where, and what to do."""

from collections.abc import Sequence


class DataError(ValueError):
    """Data the user gave is missing, torn, undecodable or too small; the message is one line with the way out.

    details: lines to be shown before it, where it speaks of several things.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(" ".join(str(message).split()))
        self.details = list(details)

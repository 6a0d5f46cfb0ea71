"""The one error that bad data raises: a single line that says what, where, and what to do."""


class DataError(ValueError):
    """Data the user gave is missing, torn, undecodable or too small; the message is one line with the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))

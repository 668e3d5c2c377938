"""The message of an error as one line."""


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks; "" if it has none."""
    return " ".join(str(error).split())

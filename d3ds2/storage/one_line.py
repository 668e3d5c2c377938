"""Messages that are one line, whatever names and texts of others they contain."""

LONGEST = 2000  # characters


def one_line(error: object) -> str:
    """Return a message without line breaks; other characters that cannot be printed are escaped, as in \\x00."""
    line = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]} …"
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class OneLineError(ValueError):
    """An error whose message is one line."""

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))

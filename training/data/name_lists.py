"""Lists of names by which meshes or shapes are selected: text files with a name on each line."""

from collections.abc import Iterable
from pathlib import Path

from d3ds2.storage.atomic_file import replacing


def read_names(file: str | Path) -> set[str]:
    """Read a list of names. Empty lines and lines that begin with # are not names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no name, or is not text.
    """
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a name on each line of {file}, got no text: {error}") from error
    names = {line for line in lines if line and not line.startswith("#")}
    if not names:
        raise ValueError(f"expected a name on each line of {file}, got none")
    return names


def write_names(file: str | Path, names: Iterable[str]) -> None:
    """Write a list of names, sorted, whole or not at all. Raises OSError if it cannot be written."""
    with replacing(Path(file)) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in sorted(names)))

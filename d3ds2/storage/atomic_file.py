"""Write files that appear whole or not at all."""

import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

STEM_LETTERS = 40  # of the name, so that the temporary name is not too long either


@contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Yield the path of a file beside `path`; rename it to `path` when the block ends, delete it when the block raises.

        with replacing("mesh.glb") as temporary:
            temporary.write_bytes(data)

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(path)
    temporary = _create_beside(path)
    try:
        yield temporary
        with suppress(OSError):  # nothing is there, or a link that leads nowhere
            temporary.chmod(path.stat().st_mode & 0o777)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create_numbered(folder: str | Path, start: str, end: str, first: int = 1) -> Path:
    """Create an empty file under the first free number, and return its path: nobody else gets the same one.

    Args:
        folder: where the file is made.
        start, end: of its name, before and after the number of five digits.
        first: the number to begin with.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    number = first
    while True:
        path = Path(folder) / f"{start}{number:05}{end}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            number += 1
        else:
            return path


def check_creatable(path: str | Path) -> None:
    """Check that `replacing` can make its file beside `path`, by making and deleting it. Raises OSError."""
    _create_beside(Path(path)).unlink()


def _create_beside(path: Path) -> Path:
    """Create an empty hidden file beside `path`, which no other process has, and return its path."""
    temporary = path.with_name(f".{path.stem[:STEM_LETTERS]}.{uuid.uuid4().hex}{path.suffix}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the user's umask takes
    return temporary

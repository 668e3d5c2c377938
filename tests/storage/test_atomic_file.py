"""Files that appear whole or not at all."""

import errno
import os

import pytest

from d3ds2.storage.atomic_file import replacing


def test_a_full_disk_keeps_the_old_file_and_is_named(tmp_path):
    """The disk says that it is full at a write, which names no file."""
    (tmp_path / "mesh.glb").write_text("old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: '.*mesh\.glb'"), replacing(tmp_path / "mesh.glb") as f:
        f.write_text("new")
        raise full
    assert [path.name for path in tmp_path.iterdir()] == ["mesh.glb"] and (tmp_path / "mesh.glb").read_text() == "old"


def test_an_error_that_names_another_file_keeps_that_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*other'"), replacing(tmp_path / "mesh.glb"):
        (tmp_path / "other").read_text()

"""The table of all cameras: as the files say, kept for the next start, and never older than a file."""

import json
import os
from pathlib import Path

import pytest

from training.data import cameras
from training.data.cameras import TABLE, read_cameras
from training.data.damaged_files import TooManyDamagedError


def write_cameras(folder: Path, azimuths: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    views = [{"file": f"{i:03d}.png", "camera": {"azimuth": azimuth}} for i, azimuth in enumerate(azimuths)]
    (folder / "cameras.json").write_text(json.dumps({"views": views}))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Four shapes; "c" has no pictures. A table is written from three shapes on."""
    monkeypatch.setattr(cameras, "MANY", 3)
    for name, azimuths in {"a": [0, 100], "b": [-80], "d": [170, 20, 280]}.items():
        write_cameras(tmp_path / "views" / name, azimuths)
    return tmp_path


def as_lists(data: Path, names: str, turn: bool = True) -> tuple:
    found = read_cameras(str(data), list(names), turn)
    files = [[path.relative_to(data / "views").as_posix() for path in paths] for paths in found.files]
    return found.names, files, list(found.turns), found.first.tolist()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files that were read."""
    seen, read = [], cameras._read_all
    monkeypatch.setattr(cameras, "_read_all", lambda files: seen.extend(files) or read(files))
    return seen


def test_the_table_says_what_the_files_say_and_is_kept(data, reads):
    expected = (
        ["d", "a", "b"],
        [["d/000.png", "d/001.png", "d/002.png"], ["a/000.png", "a/001.png"], ["b/000.png"]],
        [[2, 0, 3], [0, 1], [3]],
        [0, 3, 5, 6],
    )
    assert as_lists(data, "dcab") == expected and len(reads) == 3
    assert (data / TABLE).is_file()
    assert as_lists(data, "dcab") == expected and len(reads) == 3
    assert as_lists(data, "b") == (["b"], [["b/000.png"]], [[3]], [0, 1])
    assert as_lists(data, "ab", turn=False)[2] == [[0, 0], [0]]
    assert len(reads) == 3
    found = read_cameras(str(data), ["a", "b"], True).turns
    assert [row.nonzero()[0].tolist() for row in found.symmetries()] == [[0, 1, 4, 5], [3, 7]]
    assert found.symmetries(1, 2).nonzero()[1].tolist() == [3, 7]


def test_files_that_changed_came_or_went_are_read_again(data, reads):
    as_lists(data, "abcd")
    reads.clear()
    write_cameras(data / "views" / "b", [10.0, 100.0])
    write_cameras(data / "views" / "c", [-100.0])
    (data / "views" / "d" / "cameras.json").unlink()
    names, _, turns, _ = as_lists(data, "abcd")
    assert names == ["a", "b", "c"] and turns == [[0, 1], [0, 1], [3]]
    assert sorted(Path(file).parent.name for file in reads) == ["b", "c"]
    reads.clear()
    assert as_lists(data, "abcd")[0] == ["a", "b", "c"] and not reads
    (data / TABLE).write_bytes((data / TABLE).read_bytes()[:-9])  # damaged: made again
    assert as_lists(data, "abcd")[0] == ["a", "b", "c"] and len(reads) == 3


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(data, reads, monkeypatch):
    monkeypatch.setattr(cameras.Table, "write", lambda *_: os.listdir(data / "nothing"))
    for start in (1, 2):
        assert as_lists(data, "abd")[0] == ["a", "b", "d"] and len(reads) == 3 * start


def test_damaged_files_are_named(data, capsys):
    (data / "views" / "a" / "cameras.json").write_text("{")
    assert as_lists(data, "abd")[0] == ["b", "d"]
    assert "a/cameras.json" in capsys.readouterr().err
    (data / "views" / "b" / "cameras.json").write_text('{"views": 3}')
    with pytest.raises(TooManyDamagedError, match="2 of 3 are damaged"):
        as_lists(data, "abd")

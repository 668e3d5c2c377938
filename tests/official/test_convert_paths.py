"""The converter with paths that cannot work: one line, before any work, and nothing is left."""

import json
import os
import re
import shutil

import pytest

from d3ds2.official.config import OfficialError
from d3ds2.official.convert import IMAGE_ENCODER_FILE, convert
from d3ds2.storage.model_folder import load_settings
from tests.support.bounded import as_nobody, outcome
from tests.support.official_release import write_release


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "v1.1"
    write_release(folder, "v1.1")
    convert(folder, folder.parent / "model")  # imports what a conversion needs
    return folder


def refused(*arguments) -> str:
    error = outcome(lambda: convert(*arguments), OfficialError)
    assert isinstance(error, OfficialError), error
    return str(error)


def test_a_link_is_followed_to_the_folder_that_it_names(release, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    (tmp_path / "to_empty").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    for link, folder in (("dangling", "made"), ("to_empty", "empty")):
        assert outcome(lambda link=link: convert(release, tmp_path / link)) == "v1.1"
        assert (tmp_path / link).is_symlink() and load_settings(tmp_path / folder)[0] == "official-v1.1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "made", "to_empty"]


def test_a_target_that_cannot_be_made_is_one_line(release, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for target, message in (
        ("loop", "loop exists already"),
        ("file", "file exists already"),
        ("file/model", "Not a directory|File exists"),
        ("loop/model", "Too many levels of symbolic links|File exists|Not a directory"),
        ("x" * 300, "File name too long"),
        ("made/" + "x" * 300 + "/model", "File name too long"),
        ("a\0b", "without a NUL character"),
    ):
        assert re.search(message, refused(release, tmp_path / target)), target
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_name_of_250_letters_can_be_made(release, tmp_path):
    assert outcome(lambda: convert(release, tmp_path / ("m" * 250))) == "v1.1"


def test_a_folder_without_permission_is_one_line(release, tmp_path):
    tmp_path.chmod(0o555)
    with as_nobody(tmp_path, release / "config.yaml"):
        for target in ("model", "made/model"):
            assert "Permission denied" in refused(release, tmp_path / target)
    tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []


def test_odd_sources_and_encoders_are_one_line(release, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 10**9}))
    for source in ("y" * 300, "a\0b", "absent", "a\nb"):
        refused(tmp_path / source, tmp_path / "model")
    for encoder in ("y" * 300, "a\0b", "absent", "encoder", "<b>"):
        refused(release, tmp_path / "model", tmp_path / encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_full_disk_leaves_nothing(release, tmp_path, monkeypatch):
    def full_disk(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d3ds2.storage.model_folder.save_file", full_disk)
    assert "No space left on device" in refused(release, tmp_path / "model")
    monkeypatch.undo()
    monkeypatch.setattr(os, "rename", full_disk)
    monkeypatch.setattr("pathlib.Path.rename", full_disk)
    assert "No space left on device" in refused(release, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_is_a_folder_of_the_source(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "release", copy_function=os.link)
    (copy / IMAGE_ENCODER_FILE).unlink()
    (copy / IMAGE_ENCODER_FILE).symlink_to(copy / "nothing")
    assert "no image encoder" in refused(copy, tmp_path / "model")


def test_a_config_that_multiplies_itself_or_is_deep_is_one_line(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "release", copy_function=os.link)
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    deep = {"[" * 500: "damaged file", "[" * 501: "at most 500 lists", " " * 65_537: "at most 65,536 bytes"}
    for text, message in {bomb: "without aliases", **deep}.items():
        (copy / "config.yaml").unlink()
        (copy / "config.yaml").write_text(text)
        assert message in refused(copy, tmp_path / "model")

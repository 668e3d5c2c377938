"""Every script on damaged inputs and on disks that refuse: no traceback, nothing lost, the file named in one line.

A damaged file is cut off, or has one wrong bit. Either the script ends with exit code 1 and one line that names the
file, or it goes on: it names the file and leaves it out, or makes it again. All other inputs stay what they were.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.training_chain import Chain, save_untrained
from tests.support.training_data import R, write_meshes, write_toml
from training import (
    encode_latents,
    evaluate,
    pack,
    prepare_shapes,
    render_views,
    score_meshes,
    train_dit,
    train_structure_dit,
    train_structure_vae,
    train_vae,
)
from training.command import run_command
from training.data import damaged_files
from training.distributed import run_script
from training.mesh_jobs import failure_of
from training.run import read_metrics

pytestmark = pytest.mark.long
FINE = 64  # the lowest resolution at which a model is evaluated
STEPS, BEFORE = 4, 2  # of a trainer, and of the run that it continues
TRAINERS = {
    "structure_vae": (train_structure_vae, train_structure_vae.TrainStructureVAEConfig),
    "structure_dit": (train_structure_dit, train_structure_dit.TrainStructureDiTConfig),
    "vae": (train_vae, train_vae.TrainVAEConfig),
    "dit": (train_dit, train_dit.TrainDiTConfig),
}
OF_MESHES = {
    "prepare_shapes": (prepare_shapes, prepare_shapes.PrepareShapesConfig),
    "render_views": (render_views, render_views.RenderViewsConfig),
    "score_meshes": (score_meshes, score_meshes.ScoreMeshesConfig),
}
FILES = {  # by the name of an input; {run}: the trainer's folder
    "shape": f"data/shapes/{R}/ball.safetensors",
    "fine_shape": f"data/shapes/{FINE}/pill.safetensors",
    "latents": f"data/latents/{R}/ball@*.safetensors",
    "moments": f"data/latents/{R}/moments.json",
    "picture": "data/views/ball/001.png",
    "cameras": "data/views/ball/cameras.json",
    "index": "data/index.json",
    "metrics": "{run}/metrics.jsonl",
    "checkpoint": f"{{run}}/step_{BEFORE:08d}/*model-00001*.safetensors",
    "settings": "{run}/config.json",
    "structure_vae": "model/structure_vae.safetensors",
    "image_encoder": "model/image_encoder.safetensors",
    "sdf_vae": "model/sdf_vae.safetensors",
    "model": "model/config.json",
    "mesh": "meshes/box.stl",
    "corpus": "meshes/index.json",
}
ENDS, SKIPS, AGAIN, ASIDE = "ends", "skips", "makes it again", "moves it aside"
OF_RUNS = [("index", ENDS), ("metrics", SKIPS), ("checkpoint", SKIPS), ("settings", ENDS)]
CASES = {
    "vae": [("shape", SKIPS), *OF_RUNS],
    "structure_vae": [("shape", SKIPS), *OF_RUNS],
    "structure_dit": [
        ("shape", SKIPS),
        ("picture", SKIPS),
        ("cameras", SKIPS),
        ("structure_vae", ENDS),
        ("model", ENDS),
        *OF_RUNS,
    ],
    "dit": [
        ("latents", SKIPS),
        ("picture", SKIPS),
        ("cameras", SKIPS),
        ("moments", ENDS),
        ("image_encoder", ENDS),
        ("model", ENDS),
        *OF_RUNS,
    ],
    "encode_latents": [
        ("shape", SKIPS),
        ("latents", AGAIN),
        ("moments", AGAIN),
        ("index", ENDS),
        ("sdf_vae", ENDS),
        ("model", ENDS),
    ],
    "prepare_shapes": [("shape", AGAIN), ("index", ASIDE), ("mesh", SKIPS), ("corpus", ENDS)],
    "render_views": [("picture", AGAIN), ("cameras", AGAIN), ("mesh", SKIPS), ("corpus", ENDS)],
    "score_meshes": [("index", ENDS), ("mesh", SKIPS), ("corpus", ENDS)],
    "pack": [("shape", SKIPS), ("latents", SKIPS), ("picture", SKIPS), ("cameras", SKIPS), ("index", ENDS)],
    "evaluate": [("fine_shape", ENDS), ("index", ENDS), ("sdf_vae", ENDS), ("model", ENDS)],
}
WITHOUT_CHECKSUM = {"mesh", "structure_vae", "image_encoder", "sdf_vae"}  # a wrong bit may be a right file


CHAIN = Chain("data", Path())  # in the working directory


def config_of(script: str):
    if script in TRAINERS:
        config = getattr(CHAIN, script)
        return dataclasses.replace(config, run=dataclasses.replace(config.run, steps=STEPS, workers=0, save_every=1))
    if script == "encode_latents":
        return dataclasses.replace(CHAIN.latents, verify=True)
    if script == "prepare_shapes":
        return prepare_shapes.PrepareShapesConfig(resolutions=(R, FINE), workers=1, verify=True)
    if script == "render_views":
        return render_views.RenderViewsConfig(views=2, size=64, supersample=1, workers=1, verify=True)
    if script == "score_meshes":
        return score_meshes.ScoreMeshesConfig(workers=1)
    if script == "pack":
        return pack.PackConfig(workers=1)
    return evaluate.EvaluateConfig(
        *("data", "model"),
        **{"out_dir": "evaluation", "split": "val", "parts": ("round_trip",), "device": "cpu", "workers": 1},
        **{"num_points": 500, "cells": 32, "sampling": {"sdf_resolution": FINE}},
    )


def call(script: str, capfd, toml_folder: Path) -> tuple[int, str]:
    """Run a script as its command line does; return its exit code and all that it printed."""
    config, toml = config_of(script), toml_folder / f"{script}.toml"
    write_toml(toml, config)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, str(toml)])
        if script in TRAINERS:
            run_script(TRAINERS[script][0].train, type(config), [str(toml)])
        elif script == "encode_latents":
            run_script(encode_latents.main, type(config), [str(toml)])
        else:
            run_command({**OF_MESHES, "pack": (pack,), "evaluate": (evaluate,)}[script][0].main, type(config))
    said = "".join(capfd.readouterr())
    if isinstance(ended.value.code, str):  # which Python prints on its way out
        return 1, f"{said}\n{ended.value.code}\n"
    return ended.value.code, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with meshes, all that is made of them, a model, and a run of each trainer that has not ended."""
    root = tmp_path_factory.mktemp("whole")
    write_meshes(root / "meshes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run_here(patch)
        prepare_shapes.main(config_of("prepare_shapes"))
        render_views.main(config_of("render_views"))
        save_untrained(CHAIN)
        for name, (module, _) in TRAINERS.items():
            shutil.copytree("model", "untrained")  # the networks that the runs start from
            config = config_of(name)
            module.train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=BEFORE)))
            shutil.rmtree("model")
            Path("untrained").rename("model")
    return root


def run_here(patch: pytest.MonkeyPatch) -> None:
    """Work on meshes without worker processes, which take seconds to start; test_mesh_jobs.py tests those."""

    def run_engine(function, entries, config):
        for entry in entries:
            try:
                yield entry, function(entry, config)
            except (ValueError, OSError) as error:
                yield entry, failure_of(error)

    for module, _ in OF_MESHES.values():
        patch.setattr(module, "run_engine", run_engine)


@pytest.fixture
def root(whole, tmp_path, monkeypatch) -> Path:
    """The working directory: a copy of the whole folder. One shape of four may be skipped."""
    monkeypatch.setattr(damaged_files, "SHARE", 0.3)
    run_here(monkeypatch)
    shutil.copytree(whole, tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path / "root"


def files_of(root: Path, script: str, thing: str) -> list[Path]:
    found = sorted(root.glob(FILES[thing].format(run=script)))
    assert found
    return found


def contents(root: Path) -> dict[Path, bytes]:
    """The inputs of all scripts: what is under meshes/, data/ and model/, and what a trainer keeps."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def damage(file: Path, how: str) -> None:
    """Cut a file in the middle; or change a bit there, or in the first array, which all scripts read."""
    data = bytearray(file.read_bytes())
    place = len(data) // 2
    if how == "cut off":
        data = data[:place]
    else:
        if file.suffix == ".safetensors":
            place = 8 + int.from_bytes(data[:8], "little") + 2
        data[place] ^= 0x80  # makes text no text
    file.write_bytes(data)


def cases() -> Iterator:
    for script, inputs in CASES.items():
        for thing, outcome in inputs:
            for how in ("cut off", "wrong bit"):
                if how == "wrong bit" and thing in WITHOUT_CHECKSUM:
                    continue
                yield pytest.param(script, thing, how, outcome, id=f"{script}-{thing}-{how}")


@pytest.mark.parametrize(("script", "thing", "how", "outcome"), cases())
def test_a_damaged_input_is_named_and_nothing_is_lost(root, capfd, script, thing, how, outcome):
    damaged = files_of(root, script, thing)
    if (script, thing) == ("encode_latents", "shape"):
        shutil.rmtree(root / "data" / "latents")  # else no shape is read
    before = contents(root)
    for file in damaged:
        damage(file, how)
    code, said = call(script, capfd, root.parent)
    names = [file.parent.name if thing == "checkpoint" else file.name for file in damaged]
    lines = [line for line in said.replace("\r", "\n").splitlines() if any(name in line for name in names)]
    assert "Traceback" not in said
    assert said.count("error: ") == (code != 0)
    if outcome == ENDS:
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), said
    else:
        assert code == 0, said
    if outcome == AGAIN:
        assert all(file.read_bytes() == before[file] for file in damaged)
    elif thing == "mesh":  # listed with the failures of its script
        assert any("box" in file.read_text() for file in (root / "data").glob("*failures.jsonl"))
    elif outcome != ENDS and (thing, how) != ("metrics", "cut off"):  # a killed run leaves such a line
        assert lines, said
    if outcome == ASIDE:
        assert damaged[0].with_name(f"{damaged[0].name}.damaged").is_file()
        records = [json.loads(data) for data in (damaged[0].read_bytes(), before[damaged[0]])]
        assert len({str(sorted((r["name"], *r["checksums"].values()) for r in rs)) for rs in records}) == 1
    if outcome != ENDS and script in TRAINERS:
        assert read_metrics(root / script)[-1]["step"] == STEPS
    after = contents(root)
    for file in before.keys() - {*damaged}:
        if not is_output(file.relative_to(root), script):
            assert after.get(file) == before[file], file
    if outcome == ENDS:  # and when the file is mended, the same command succeeds
        for file in damaged:
            file.write_bytes(before[file])
        assert call(script, capfd, root.parent)[0] == 0


def is_output(file: Path, script: str) -> bool:
    """Whether a script may change a file."""
    if script in TRAINERS:
        written = {"vae": ["sdf_vae"], "dit": ["latent_dit"], "structure_dit": ["structure_dit", "image_encoder"]}
        names = ["config.json", *(f"{network}.safetensors" for network in written.get(script, [script]))]
        return file.parts[0] == script or (file.parts[0] == "model" and file.name in names)
    if file.name.endswith("failures.jsonl") or file.name == "views.safetensors":
        return True
    if script in ("prepare_shapes", "score_meshes"):
        return file.name == "index.json" and file.parts[0] == "data"
    return script == "encode_latents" and (file.parts[0] == "model" or file.parts[1] == "latents")


# --- disks that refuse


@pytest.fixture
def disk(whole, tmp_path, monkeypatch) -> Iterator[Path]:
    """The working directory: a copy of the whole folder on a disk of its own, of 20 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("expected the right to mount a small disk")
    try:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        monkeypatch.chdir(folder)
        run_here(monkeypatch)
        yield folder
    finally:
        os.chdir("/")
        subprocess.run(["umount", "--lazy", folder], check=True)  # a process may have been started there


def fill(folder: Path, room: int) -> Path:
    """Fill a disk but for some bytes; return the file that does."""
    filler = folder / "filler"
    left = shutil.disk_usage(folder).free - room
    filler.write_bytes(bytes(max(left, 0)))
    return filler


LITTLE = ("render_views", "score_meshes", "evaluate")  # write little here
MADE_AGAIN = {  # what is deleted beforehand, so that the script writes
    "prepare_shapes": f"data/shapes/{R}/ball.safetensors",
    "render_views": "data/views/ball",
    "encode_latents": f"data/latents/{R}",
}


@pytest.mark.parametrize("script", CASES)
@pytest.mark.parametrize("refusal", ["full", "read-only"])
def test_a_disk_that_refuses_is_one_line_and_nothing_is_lost(disk, capfd, script, refusal):
    if script in MADE_AGAIN:
        deleted = disk / MADE_AGAIN[script]
        shutil.rmtree(deleted) if deleted.is_dir() else deleted.unlink()
    before = contents(disk)
    if refusal == "full":
        fill(disk, 0 if script in LITTLE else 16 << 10)
    else:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, said = call(script, capfd, disk.parent)
    reason = "No space left on device" if refusal == "full" else "Read-only file system"
    errors = [line for line in said.replace("\r", "\n").splitlines() if "error: " in line]
    assert code == 1 and "Traceback" not in said and len(errors) == 1, said
    assert reason in errors[0] and any(f"{folder}" in errors[0] for folder in ("data", "model", script, "evaluation"))
    after = contents(disk)
    for file in before:
        kept = after.get(file)
        assert kept == before[file] or (kept and is_output(file.relative_to(disk), script)), file
    assert not [file for file in after.keys() - before.keys() if file.name.startswith(".") and "lock" not in file.name]
    (disk / "filler").unlink() if refusal == "full" else subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert call(script, capfd, disk.parent)[0] == 0

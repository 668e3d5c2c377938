"""Released checkpoints -> model folder: every tensor arrives; bad files are refused in one line and leave nothing."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from d3ds2.__main__ import main
from d3ds2.networks.model_files import load_model
from d3ds2.official.config import OfficialError
from d3ds2.official.convert import FILES, OFFICIAL_REPO, OFFICIAL_SUBFOLDER, convert
from d3ds2.storage.model_folder import FineSamplingConfig, load_settings
from tests.support.golden import ROOT
from tests.support.official_release import write_release


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """The folder and the modules of each version."""
    folders = {version: tmp_path_factory.mktemp("release") / version for version in ("v1.0", "v1.1")}
    return {version: (folder, write_release(folder, version)) for version, folder in folders.items()}


@pytest.fixture
def release(releases, tmp_path):
    """A copy of v1.1 that a test may damage. Its files are hard links: replace them, never write into them."""
    shutil.copytree(releases["v1.1"][0], tmp_path / "release", copy_function=os.link)
    return tmp_path / "release"


def rewrite(file: Path, contents: bytes) -> None:
    file.unlink()
    file.write_bytes(contents)


def change(release: Path, name: str, edit) -> None:
    """Load a checkpoint, edit it and write it back."""
    contents = torch.load(release / name, weights_only=True)
    edit(contents)
    (release / name).unlink()
    torch.save(contents, release / name)


def assert_refused(release: Path, *words: str) -> None:
    target = release.parent / "made" / "model"
    before = sorted(release.parent.rglob("*"))
    with pytest.raises(OfficialError) as raised:
        convert(release, target)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert sorted(release.parent.rglob("*")) == before  # nothing half-written, not even a folder


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_every_tensor_arrives(releases, tmp_path, version):
    source, modules = releases[version]
    seen = []
    assert convert(source, tmp_path / "new" / "model", on_file=seen.append) == version
    assert seen == ["dinov2_vitl14_reg4_pretrain.pth", *FILES]
    networks, sampling = load_model(tmp_path / "new" / "model")
    for file, parts in FILES.items():
        for part, network in parts.items():
            expected, actual = modules[file][part], networks[network]
            assert actual.config == expected.config, network
            assert actual.state_dict().keys() == expected.state_dict().keys()
            for key, tensor in expected.state_dict().items():
                assert torch.equal(actual.state_dict()[key], tensor), f"{network} {key}"
    assert load_settings(tmp_path / "new" / "model")[0] == f"official-{version}"
    assert (sampling.sdf_resolution, sampling.level, sampling.half_times) == (64, 0.2, True)
    assert (sampling.structure_steps, sampling.structure_shift, sampling.structure_guidance) == (50, 6.0, 7.0)
    assert (sampling.latent_steps, sampling.latent_shift, sampling.latent_guidance) == (30, 6.0, 7.0)
    assert sampling.fine == FineSamplingConfig(128, 15, 8.0, 7.0)


def test_half_precision_stays_half(release, tmp_path):
    halved = release.parent / "half"
    shutil.copytree(release, halved)
    for file in FILES:
        change(halved, file, lambda c: [c.update({p: {k: v.half() for k, v in c[p].items()}}) for p in [*c]])
    convert(halved, tmp_path / "model")
    convert(release, tmp_path / "full")
    half, full = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.stem != "image_encoder")
        for folder in (tmp_path / "model", tmp_path / "full")
    )
    assert half < 0.6 * full
    assert load_model(tmp_path / "model")[0].keys() == load_model(tmp_path / "full")[0].keys()


def test_a_single_release_inside_a_folder_is_found(release, tmp_path):
    assert convert(release.parent, tmp_path / "model") == "v1.1"
    shutil.copytree(release, tmp_path / "other")
    with pytest.raises(OfficialError, match=r"several releases in .*, choose one: other, release"):
        convert(tmp_path, tmp_path / "model2")


# --- files that are not what they should be


def test_code_is_never_run(release, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'attacked'}",)

    change(release, "model_dense.ckpt", lambda contents: None)
    contents = torch.load(release / "model_dense.ckpt", weights_only=True) | {"vae": Attack()}
    torch.save(contents, release / "model_dense.ckpt")
    assert_refused(release, "model_dense.ckpt holds more than tensors (", "system")
    rewrite(release / "model_dense.ckpt", pickle.dumps(contents))  # torch's old format, which is no archive
    assert_refused(release, "model_dense.ckpt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", ["model_sparse_1024.ckpt", "dinov2_vitl14_reg4_pretrain.pth"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused(release, name, share):
    contents = (release / name).read_bytes()
    rewrite(release / name, contents[: int(share * len(contents))])
    assert_refused(release, "damaged file", name)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_flipped_bits_are_refused(release, share):
    contents = bytearray((release / "model_refiner.ckpt").read_bytes())
    contents[int(share * len(contents))] ^= 4
    rewrite(release / "model_refiner.ckpt", bytes(contents))
    assert_refused(release, "damaged file", "model_refiner.ckpt")


def test_files_that_are_no_checkpoint_are_refused(release):
    rewrite(release / "model_refiner.ckpt", b"<html>404 not found</html>\n" * 40)
    assert_refused(release, "damaged file", "model_refiner.ckpt")


def test_missing_files_are_named_together(release):
    (release / "model_refiner.ckpt").unlink()
    (release / "model_dense.ckpt").unlink()
    assert_refused(release, "missing in", "model_dense.ckpt, model_refiner.ckpt")


def test_a_missing_image_encoder_is_named(release):
    (release / "dinov2_vitl14_reg4_pretrain.pth").unlink()
    assert_refused(release, "no image encoder at", "dinov2_vitl14_reg4_pretrain.pth of torch.hub, or a transformers")


GATE, BIAS = "blocks.1.self_attn.gate.0.weight", "encoder.downsample.2.out_layers.3.conv.bias"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c["dit"].pop(GATE), ("misses 1 tensors", GATE)),
        (lambda c: c["vae"].update({"encoder.extra": torch.zeros(2)}), ("has unexpected 1 tensors", "encoder.extra")),
        (lambda c: c["vae"].update({BIAS: torch.zeros(7)}), ("has misshapen 1 tensors", BIAS, "(7,)", "(64,)")),
        (lambda c: c["dit"].update({"blocks.0.self_attn.to_q.weight": torch.zeros(1)}), ("unexpected", "to_q")),
        (lambda c: c["dit"][GATE].fill_(float("nan")), ("expected finite values in latent_dit", "gate")),
        (lambda c: c["dit"].update({GATE: torch.zeros(3, 64, dtype=torch.int8)}), ("floating tensors in dit", GATE)),
        (lambda c: c["dit"].update({GATE: 3.0}), ("floating tensors in dit", GATE)),
        (lambda c: c.update(ema=c.pop("dit")), ("expected vae and dit at the top, got ema, vae",)),
        (lambda c: c.update(dit={}), ("expected a state dict in dit",)),
    ],
)
def test_tensors_are_accounted_for_by_name(release, edit, words):
    change(release, "model_sparse_512.ckpt", edit)
    assert_refused(release, "model_sparse_512.ckpt", *words)


def test_all_kinds_of_wrong_tensors_are_listed_at_once(release):
    def edit(contents):
        contents["dit"]["blocks.9.x"] = contents["dit"].pop(GATE)
        contents["dit"]["out_layer.bias"] = torch.zeros(3)

    change(release, "model_sparse_512.ckpt", edit)
    assert_refused(release, f"misses 1 tensors: {GATE}; has unexpected 1 tensors: blocks.9.x; has misshapen 1 tensors")


def test_the_structure_transformer_must_have_its_position(release):
    change(release, "model_dense.ckpt", lambda c: c["dit"]["pos_emb"].add_(1))
    assert_refused(release, "model_dense.ckpt: pos_emb", "is not the embedding of the grid")
    change(release, "model_dense.ckpt", lambda c: c["dit"].pop("pos_emb"))
    assert_refused(release, "model_dense.ckpt misses tensors: pos_emb")


# --- versions


def test_checkpoints_of_another_version_than_the_config_are_refused(releases, release):
    (release / "model_sparse_1024.ckpt").unlink()
    shutil.copy(releases["v1.0"][0] / "model_sparse_1024.ckpt", release)
    assert_refused(
        release, "model_sparse_1024.ckpt is not of v1.1, as config.yaml says", "convolutional compression of 4³",
        "instead of pointwise compression of 8³ voxels over all image tokens",
    )  # fmt: skip


def edit_config(release: Path, edit) -> None:
    entries = yaml.safe_load((release / "config.yaml").read_text())
    edit(entries)
    rewrite(release / "config.yaml", yaml.safe_dump(entries).encode())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda e: e["sparse_dit_512"]["params"].update(compression_version="v3"), ("compression_version", "got 'v3'")),
        (lambda e: e["sparse_dit_512"]["params"].update(compression_version="v2"), ("neither v1.0 nor v1.1",)),
        (lambda e: e["sparse_dit_512"]["params"].update(pe_mode="rope"), ("pe_mode", "expected 'ape', got 'rope'")),
        (lambda e: e["sparse_dit_1024"]["params"].update(model_channels="big"), ("sparse_dit_1024", "expected int")),
        (lambda e: e["sparse_dit_1024"]["params"].pop("topk"), ("sparse_dit_1024.params has no topk",)),
        (lambda e: e["dense_dit"]["params"].update(num_heads=5), ("dense_dit", "num_heads dividing hidden_size")),
        (lambda e: e["dense_vae"].update(target="direct3d.Other"), ("dense_vae to be a DenseShapeVAE, got Other",)),
        (lambda e: e.pop("refiner"), ("has no entry refiner",)),
        (lambda e: e["sparse_scheduler_1024"]["params"].update(num_train_timesteps=500), ("expected 1000, got 500",)),
        (lambda e: e["dense_scheduler"]["params"].update(shift=0), ("dense_scheduler.params.shift",)),
        (lambda e: e["refiner_1024"]["params"].update(patch_size=33), ("model_refiner_1024.ckpt", "patch_size")),
        (lambda e: e["dense_dit"]["params"].update(num_blocks=3), ("model_dense.ckpt misses", "blocks.2.")),
        (lambda e: e["sparse_vae_512"]["params"].update(num_heads_encoder=4), ("num_heads of encoder and decoder",)),
    ],
)
def test_a_config_that_does_not_fit_is_refused(release, edit, words):
    edit_config(release, edit)
    assert_refused(release, *words)


def test_settings_that_change_no_number_are_ignored(release, tmp_path):
    edit_config(release, lambda e: e["sparse_dit_512"]["params"].update(use_fp16=False, some_new_setting=3))
    assert convert(release, tmp_path / "model") == "v1.1"


@pytest.mark.parametrize("contents", [b"dense_vae: [", b"just words", b"\xff\xfe\x00\x80", b""])
def test_a_damaged_config_is_refused(release, contents):
    rewrite(release / "config.yaml", contents)
    assert_refused(release, "config.yaml")


def test_an_image_encoder_of_another_size_is_refused(release):
    state = torch.load(release / "dinov2_vitl14_reg4_pretrain.pth", weights_only=True)
    without_registers = {key: tensor for key, tensor in state.items() if key != "register_tokens"}
    (release / "dinov2_vitl14_reg4_pretrain.pth").unlink()
    torch.save(without_registers, release / "dinov2_vitl14_reg4_pretrain.pth")
    assert_refused(release, "is not DINOv2 with registers")
    edit_config(release, lambda e: [e[name]["params"].update(cond_channels=32) for name in ("dense_dit",)])
    (release / "dinov2_vitl14_reg4_pretrain.pth").unlink()
    torch.save(state, release / "dinov2_vitl14_reg4_pretrain.pth")
    assert_refused(release, "gives tokens of 64 channels, expected 32")


# --- the command line


def test_command(release, tmp_path, capsys):
    assert main(["convert", str(release), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith("model: Direct3D-S2 v1.1")
    assert main(["convert", str(release), str(tmp_path / "model")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == f"error: no folder {tmp_path / 'absent'}\n"
    assert main(["convert", str(release)]) == 2
    assert "target" in capsys.readouterr().err


def test_download_reads_the_cache_and_says_when_it_cannot(release, tmp_path):
    """Run the hub's own client offline: a cached repository is converted, any other is refused."""
    repo = tmp_path / "hub" / f"models--{OFFICIAL_REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(release, repo / "snapshots" / ("0" * 40) / OFFICIAL_SUBFOLDER)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "d3ds2", "convert", "--download"]
    for repository, code, words in (
        (OFFICIAL_REPO, 0, "model: Direct3D-S2 v1.1"),
        ("nobody/nothing", 2, "error: cannot download nobody/nothing"),
    ):
        arguments = [*command, repository, str(tmp_path / f"{code}" / "model")]
        done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code and words in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "2").exists()


COMMIT = "1" * 40


def hash_of(contents: bytes) -> str:
    return hashlib.sha1(contents, usedforsecurity=False).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Answer the hub's client as huggingface.co does, for one repository whose files lie in `folder`."""

    folder: Path
    asked: list

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append((self.command, path))
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        names = [str(file.relative_to(self.folder)) for file in files]
        answers = {
            "revision": {"id": OFFICIAL_REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]},
            "tree": [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": hash_of(file.read_bytes())}
                for name, file in zip(names, files, strict=True)
            ],
        }
        for kind, found in answers.items():
            if path.startswith(f"/api/models/{OFFICIAL_REPO}/{kind}/"):
                return self.answer(json.dumps(found).encode(), "application/json")
        file = self.folder / path.removeprefix(f"/{OFFICIAL_REPO}/resolve/{COMMIT}/")
        if path.startswith(f"/{OFFICIAL_REPO}/resolve/") and file.is_file():
            return self.answer(file.read_bytes(), "application/octet-stream")
        return self.send_error(404, "Entry not found")

    do_HEAD = do_GET

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("X-Repo-Commit", COMMIT),
            ("ETag", f'"{hash_of(body)}"'),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_arguments) -> None:
        pass


def test_download_fetches_the_release_from_a_hub(release, tmp_path):
    """Run the hub's own client against a server that answers like the hub: it fetches the needed files only."""
    (tmp_path / "served").mkdir()
    shutil.copytree(release, tmp_path / "served" / OFFICIAL_SUBFOLDER)
    (tmp_path / "served" / "other.bin").write_bytes(b"not asked for")
    handler = type("Served", (Hub,), {"folder": tmp_path / "served", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    encoder = release / "dinov2_vitl14_reg4_pretrain.pth"
    command = [sys.executable, "-m", "d3ds2", "convert", "--download", "--image-encoder", str(encoder), OFFICIAL_REPO]
    try:
        done = subprocess.run(
            [*command, str(tmp_path / "model")], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0 and "model: Direct3D-S2 v1.1" in done.stderr.splitlines()[-1], done.stderr
    fetched = {path.rpartition("/")[2] for command, path in handler.asked if command == "GET" and "/resolve/" in path}
    assert fetched == {"config.yaml", *FILES}
    assert load_settings(tmp_path / "model")[0] == "official-v1.1"

"""encode_latents: kept files, stops, tasks of an array, damaged shapes; and what train_dit refuses to learn from."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from d3ds2.networks.latent_dit import LatentDiTConfig
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from tests.support.training_data import R, prepared
from training import encode_latents, train_dit
from training.data.damaged_files import TooManyDamagedError
from training.data.latent_moments import moments_path, read_moments
from training.data.latent_views import LatentViews
from training.data.shape_files import latent_path, list_shapes, shape_path
from training.data.views import Views
from training.encode_latents import EncodeLatentsConfig, encode
from training.run import RunConfig
from training.train_dit import TrainDiTConfig

VAE = SDFVAEConfig(
    latent_channels=4, hidden_size=32, num_heads=2, encoder_depth=1, decoder_depth=1, group_norm_groups=2
)
ENCODER = ImageEncoderConfig(image_size=28, patch_size=14, hidden_size=16, depth=1, num_heads=2, num_registers=1)
DIT = LatentDiTConfig(
    latent_channels=4, hidden_size=32, depth=1, num_heads=16, num_kv_heads=1, context_size=16, top_k=1
)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    """A folder with the data, its latents, and a model of random weights."""
    root = tmp_path_factory.mktemp("encoded")
    shutil.copytree(prepared(tmp_path_factory), root / "data")
    torch.manual_seed(0)
    save_network(root / "model", "sdf_vae", SDFVAE(VAE), torch.float16)
    save_network(root / "model", "image_encoder", ImageEncoder(ENCODER), torch.float16)
    encode_latents.main(config_of(root))
    return root


def config_of(root: Path) -> EncodeLatentsConfig:
    return EncodeLatentsConfig(
        str(root / "data"), str(root / "model"), ("train", "val"), R, max_tokens=100, device="cpu"
    )


@pytest.fixture
def own_latents(encoded, tmp_path) -> EncodeLatentsConfig:
    """The config of a copy, which a test may change."""
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    return config_of(tmp_path)


@pytest.fixture
def batches(monkeypatch) -> list:
    """The batches encoded so far."""
    numbers = []
    monkeypatch.setattr(encode_latents, "encode", lambda *a: numbers.append(1) or encode(*a))
    return numbers


def files_of(data_dir: str) -> dict[str, bytes]:
    folder = latent_path(data_dir, R, "", 0).parent
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".safetensors" in path.name}


def test_latents_are_made_again_only_where_encoder_shapes_or_files_differ(own_latents, batches):
    config = own_latents

    def encoded_batches() -> int:
        batches.clear()
        encode_latents.main(config)
        return len(batches)

    def change(part: str) -> None:
        vae = load_network(config.model_dir, "sdf_vae")
        next(getattr(vae, part).parameters()).mul_(1.5)
        save_network(config.model_dir, "sdf_vae", vae, torch.float16)

    assert not encoded_batches()
    change("decoder")  # the latents are what they were
    assert not encoded_batches()
    change("encoder")
    assert encoded_batches() and not encoded_batches()
    torus = latent_path(config.data_dir, R, "torus", 5)
    for damage in (torus.unlink, lambda: torus.write_bytes(torus.read_bytes()[:-7]), lambda: torus.write_bytes(b"")):
        damage()
        moments_path(config.data_dir, R).unlink()
        assert encoded_batches() == 1 and not encoded_batches()
    index = Path(config.data_dir, "index.json")
    whole = json.loads(index.read_text())
    index.write_text(json.dumps([record for record in whole if record["name"] != "box"]))
    before = read_moments(moments_path(config.data_dir, R))["count"]
    assert not encoded_batches() and read_moments(moments_path(config.data_dir, R))["count"] < before
    whole[0]["checksums"][str(R)] = "another shape"
    index.write_text(json.dumps(whole))
    assert encoded_batches() and not encoded_batches()


def test_a_stopped_encoding_goes_on_and_ends_with_the_same_files(own_latents, monkeypatch, batches):
    expected, moments = files_of(own_latents.data_dir), encode_latents.main(own_latents)
    assert not batches
    shutil.rmtree(latent_path(own_latents.data_dir, R, "", 0).parent)
    write = encode_latents.write_arrays
    left = iter(range(13))

    def write_until_full(*arguments):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(encode_latents, "write_arrays", write_until_full)
    with pytest.raises(OSError, match="No space left on device"):
        encode_latents.main(own_latents)
    kept = files_of(own_latents.data_dir)
    own, other = (latent_path(own_latents.data_dir, R, f".{name}", 3) for name in ("box", "none"))
    leftovers = [path.with_name(f"{path.stem}.q1w2e3r4.safetensors") for path in (own, other)]
    for leftover in leftovers:
        leftover.touch()
    assert 0 < len(kept) < len(expected) and all(expected[name] == content for name, content in kept.items())
    assert not moments_path(own_latents.data_dir, R).exists()
    stopped_after = len(batches)
    monkeypatch.setattr(encode_latents, "write_arrays", write)
    assert encode_latents.main(own_latents) == moments
    assert [leftover.exists() for leftover in leftovers] == [False, True]
    leftovers[1].unlink()
    assert files_of(own_latents.data_dir) == expected
    assert stopped_after > 2 and len(batches) < stopped_after + 27 - len(kept) // 3  # of 27 batches of 1 to 3 shapes


def test_tasks_of_an_array_make_the_same_latents_and_the_last_writes_the_scale(own_latents):
    expected, moments = files_of(own_latents.data_dir), encode_latents.main(own_latents)
    shutil.rmtree(latent_path(own_latents.data_dir, R, "", 0).parent)
    vae = load_network(own_latents.model_dir, "sdf_vae")
    vae.config = dataclasses.replace(vae.config, latents_scale=1.0, latents_shift=0.0)
    save_network(own_latents.model_dir, "sdf_vae", vae, torch.float16)
    for i in (2, 0):
        assert encode_latents.main(dataclasses.replace(own_latents, shard=f"{i}/3")) == {}
        assert not moments_path(own_latents.data_dir, R).exists()
    summary = encode_latents.main(dataclasses.replace(own_latents, shard="1/3"))
    assert files_of(own_latents.data_dir) == expected
    assert summary["latents_scale"] == pytest.approx(moments["latents_scale"], rel=1e-12)
    assert load_network(own_latents.model_dir, "sdf_vae").config.latents_scale == summary["latents_scale"]
    assert encode_latents.main(dataclasses.replace(own_latents, shard="0/3")) == summary


def test_damaged_shapes_are_named_and_not_encoded(own_latents, capsys):
    shutil.rmtree(latent_path(own_latents.data_dir, R, "", 0).parent)
    shape_path(own_latents.data_dir, R, "box").write_bytes(b"")
    encode_latents.main(own_latents)
    assert not any(name.startswith("box@") for name in files_of(own_latents.data_dir))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped: damaged file" in line]
    assert "box.safetensors" in line and "python -m training.prepare_shapes with verify=true" in line


def test_dit_refuses_latents_of_another_vae_or_without_their_scale(own_latents, tmp_path):
    copy = own_latents.model_dir
    run = RunConfig(out_dir=str(tmp_path / "run"), steps=1, device="cpu", tensorboard=False)
    config = TrainDiTConfig(own_latents.data_dir, copy, resolution=R, batch_size=2, model=DIT, run=run)
    vae = load_network(copy, "sdf_vae")
    scaled = vae.config
    vae.config = dataclasses.replace(scaled, latents_scale=1.0, latents_shift=0.0)  # as train_vae exports it
    save_network(copy, "sdf_vae", vae, torch.float16)
    with pytest.raises(ValueError, match=r"does not have the scale of the latents .* run python -m training"):
        train_dit.train(config)
    vae.config = scaled
    next(vae.encoder.parameters()).mul_(1.5)
    save_network(copy, "sdf_vae", vae, torch.float16)
    with pytest.raises(ValueError, match="are of another VAE than the sdf_vae in"):
        train_dit.train(config)
    encode_latents.main(own_latents)
    moments_path(own_latents.data_dir, R).unlink()
    with pytest.raises(ValueError, match="are not finished: run python -m training"):
        train_dit.train(config)
    encode_latents.main(own_latents)
    train_dit.train(config)


def test_damaged_latents_are_skipped_and_replaced(own_latents, capsys):
    names, tokens = list_shapes(own_latents.data_dir, "train", R)
    arguments = R, Views(own_latents.data_dir, names, 28), tokens, 4, 2, 10_000, 0
    expected = [LatentViews(own_latents.data_dir, *arguments)[step] for step in range(6)]
    damaged = int(tokens.argmax())
    for symmetry in range(8):
        path = latent_path(own_latents.data_dir, R, names[damaged], symmetry)
        content = path.read_bytes()
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    for cache in (True, False):
        dataset = LatentViews(own_latents.data_dir, *arguments, cache=cache)
        batches = [dataset[step] for step in range(6)]
        assert capsys.readouterr().err.count("skipped: damaged file") == 1
        for step, (batch, whole) in enumerate(zip(batches, expected, strict=True)):
            shapes = (dataset.plan[step].repeat(2) // 2).tolist()
            assert len(batch.images) == len(shapes)
            for row, shape in enumerate(shapes):
                same = torch.equal(batch.images[row], whole.images[row])
                assert same == (shape != damaged)
                old, new = ((b.coords[:, 0] == row).sum() for b in (whole, batch))
                assert new <= old
        again = LatentViews(own_latents.data_dir, *arguments, cache=cache)[5]  # whatever was found damaged before
        assert all(torch.equal(a, b) for a, b in zip(again, batches[5], strict=True))
        capsys.readouterr()
    for symmetry in range(8):
        latent_path(own_latents.data_dir, R, names[damaged - 1], symmetry).write_bytes(b"")
    with pytest.raises(TooManyDamagedError, match="2 of 4 are damaged or missing, and at most 1 are skipped"):
        [LatentViews(own_latents.data_dir, *arguments)[step] for step in range(6)]

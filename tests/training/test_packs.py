"""Packed data gives the batches of its folder, from disk and from URLs; packing goes on, and names what is damaged."""

import dataclasses
import errno
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from d3ds2.geometry.voxels import Voxels
from tests.support.range_server import serve
from tests.support.training_data import R, prepared, write_latents, write_meshes
from training import pack
from training.data.array_files import DamagedFileError
from training.data.damaged_files import TooManyDamagedError
from training.data.datasets import Shapes, Structures, StructureViews
from training.data.device_pictures import DevicePictures
from training.data.latent_moments import moments_path
from training.data.latent_views import LatentViews
from training.data.loading import load_batches
from training.data.packs import open_data
from training.data.rendered_pictures import RenderedPictures, RenderedPicturesConfig, SidesOfShapes
from training.data.shape_files import list_shapes, load_shape, read_structure, shape_path
from training.data.views import Views
from training.pack import PackConfig
from training.prepare_shapes import PrepareShapesConfig
from training.prepare_shapes import main as prepare_shapes
from training.render_views import RenderViewsConfig
from training.render_views import main as render_views
from training.score_meshes import ScoreMeshesConfig
from training.score_meshes import main as score_meshes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The data of five shapes, with latents drawn at random."""
    root = tmp_path_factory.mktemp("packs") / "data"
    shutil.copytree(prepared(tmp_path_factory), root)
    write_latents(root)
    return root


@pytest.fixture(scope="module")
def packed(folder) -> Path:
    config = PackConfig(str(folder), str(folder.parent / "packed"), tar_mib=1, workers=2)
    pack.main(config)
    return Path(config.out)


@pytest.fixture
def own(folder, tmp_path) -> PackConfig:
    """The config that packs a copy of the data, which a test may change, into several small tars."""
    shutil.copytree(folder, tmp_path / "data")
    return PackConfig(str(tmp_path / "data"), str(tmp_path / "packed"), workers=2)


def batches_of(data_dir: str, workers: int = 0, **cache) -> list:
    """The first batches of every dataset."""
    names, tokens = list_shapes(data_dir, "train", R)
    views = Views(data_dir, names, 28)
    datasets = [
        Shapes(data_dir, "train", (R,), 2, 10_000, 0, (0, 3)),
        Structures(data_dir, names, R, 3, 0, (0, 4), tokens, **cache),
        StructureViews(views, 4, 2, 0, Structures(data_dir, names, R, 1, 0), with_grids=True),
        LatentViews(data_dir, R, views, tokens, 4, 2, 10_000, 0, **cache),
    ]
    return [batch for dataset in datasets for batch in load_batches(dataset, 0, 3, workers, CPU)]


def assert_equal(a, b) -> None:
    if isinstance(a, Voxels):
        a, b = (a.coords, a.neighbors), (b.coords, b.neighbors)
    if isinstance(a, tuple | list):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            assert_equal(one, two)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_a_packed_folder_gives_the_same_batches(folder, packed, memory_gib):
    assert_equal(batches_of(str(folder)), batches_of(str(packed), memory_gib=memory_gib))
    assert len(list((packed / "views").glob("*.tar"))) == 1


def test_packed_files_in_memory_give_the_same_batches(folder, packed):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.put(str(packed), "/packed", recursive=True)
    try:
        assert_equal(batches_of(str(folder)), batches_of("memory://packed", memory_gib=0.0))
    finally:
        system.rm("/packed", recursive=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_packed_files_on_a_web_server_give_the_same_batches(folder, packed, workers):
    pytest.importorskip("aiohttp")
    with serve(packed) as (url, handler):
        handler.failures = 2
        assert_equal(batches_of(str(folder)), batches_of(url, workers, memory_gib=0.0))
        handler.ranges, before = False, handler.requests
        with pytest.raises(OSError, match="expected a server that sends parts of files, but it sent all of http"):
            load_shape(shape_path(url, R, "box"))
        assert handler.requests == before + 1  # one request reads a file
        handler.ranges = True
        read_structure(shape_path(url, R, "box"))
        assert handler.requests == before + 2
    with pytest.raises(FileNotFoundError, match=r"expected memory://nothing/pack.json; make it with python -m"):
        open_data("memory://nothing")


def test_a_pack_is_read_as_a_folder_and_not_written_to(folder, packed, tmp_path):
    root = open_data(str(packed))
    assert (root / "index.json").is_file() and not (root / "index.txt").is_file()
    assert shape_path(root, R, "box").read_bytes() == shape_path(folder, R, "box").read_bytes()
    assert not shape_path(root, R, "none").is_file()
    assert [str(path) for path in moments_path(root, R).parents[1].glob("*/moments.json")] == [
        f"{packed}/latents/{R}/moments.json"
    ]
    with pytest.raises(FileNotFoundError, match=r"missing file .*packed/shapes/32/none\.safetensors"):
        load_shape(shape_path(root, R, "none"))
    write_meshes(tmp_path / "meshes")
    for main, config in (
        (prepare_shapes, PrepareShapesConfig),
        (render_views, RenderViewsConfig),
        (score_meshes, ScoreMeshesConfig),
    ):
        with pytest.raises(ValueError, match="expected a folder that can be written to, got the packed files in"):
            main(config(meshes=str(tmp_path / "meshes"), data_dir=str(packed)))
    with tarfile.open(packed / "shapes" / str(R) / "00000.tar") as file:  # any tool unpacks it
        assert sorted(file.getnames()) == sorted(
            f"shapes/{R}/{path.name}" for path in (folder / "shapes" / str(R)).iterdir()
        )


def small_tars(monkeypatch) -> None:
    monkeypatch.setattr(pack, "MIB", 4096)


def test_a_stopped_packing_goes_on_and_a_changed_file_is_packed_again(own, monkeypatch):
    small_tars(monkeypatch)
    write, left = pack.write_tar, iter(range(3))

    def write_until_full(*arguments):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(pack, "write_tar", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        pack.main(own)
    assert not (Path(own.out) / "pack.json").exists()
    tars = sorted(Path(own.out).rglob("*.tar"))
    assert len(tars) == 3
    leftover = tars[0].with_name(f".{tars[0].stem}.q1w2.tar")
    leftover.touch()
    made = []
    monkeypatch.setattr(pack, "write_tar", lambda tar, *rest: made.append(tar.path) or write(tar, *rest))
    pack.main(own)
    assert not set(made) & set(tars) and not leftover.exists()
    assert_equal(batches_of(own.data_dir), batches_of(own.out))
    made.clear()
    pack.main(own)
    assert not made
    box, torus = (shape_path(own.data_dir, R, name) for name in ("box", "torus"))
    box.write_bytes(torus.read_bytes())
    pack.main(own)
    assert len(made) == 1 and read_structure(shape_path(own.out, R, "box")).tolist() == read_structure(torus).tolist()


def test_tasks_of_an_array_pack_together(own, monkeypatch, capsys):
    small_tars(monkeypatch)
    for i in (1, 0):
        assert not (Path(own.out) / "pack.json").exists()
        pack.main(dataclasses.replace(own, shard=f"{i}/2"))
    assert "shard 1/2 is finished; the last" in capsys.readouterr().out
    assert_equal(batches_of(own.data_dir), batches_of(own.out))


def flip_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def test_damaged_files_are_named_and_left_out_and_too_many_end_it(own, capsys):
    cut_off(shape_path(own.data_dir, R, "box"))
    flip_the_end(Path(own.data_dir, "views", "can", "000.png"))
    pack.main(own)
    output = capsys.readouterr()
    assert output.err.count("skipped: damaged") == 2 and "; 2 left out" not in output.err
    assert output.out.endswith("2 left out\n")
    assert not shape_path(own.out, R, "box").is_file()
    assert_equal(batches_of(own.data_dir), batches_of(own.out))
    cut_off(shape_path(own.data_dir, R, "can"))
    shutil.rmtree(own.out)
    with pytest.raises(TooManyDamagedError, match="2 of 5 are damaged or missing"):
        pack.main(own)


def test_a_tar_that_is_cut_off_or_changed_is_named(own):
    pack.main(own)
    tar = Path(own.out, "shapes", str(R), "00000.tar")
    content = tar.read_bytes()
    with tarfile.open(tar) as file:
        last = max(file.getmembers(), key=lambda member: member.offset)
    name = Path(last.name).stem
    tar.write_bytes(content[: last.offset_data + 10])
    with pytest.raises(DamagedFileError, match=rf"{name}\.safetensors \(.*/00000\.tar is cut off\)"):
        load_shape(shape_path(own.out, R, name))
    place = last.offset_data + last.size - 9
    tar.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DamagedFileError, match=rf"{name}\.safetensors \(sharp differs from its checksum\)"):
        load_shape(shape_path(own.out, R, name))
    (Path(own.out) / "pack.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged file .*/pack\.json"):
        open_data(own.out)


def test_packed_point_maps_are_those_of_the_folder(folder, packed):
    names = list_shapes(str(folder), "train", R)[0]
    made, expected = (
        DevicePictures(Views(str(data), names, 56, augment=False), CPU, 0, with_points=True)
        for data in (packed, folder)
    )
    assert expected.points[:, 3].any()
    assert torch.equal(made.points, expected.points) and torch.equal(made.images, expected.images)


def test_packed_surfels_are_those_of_the_folder(folder, packed):
    names, _ = list_shapes(str(folder), "train", R)
    made = [
        RenderedPictures(SidesOfShapes(str(place), names, 28), RenderedPicturesConfig(), CPU)
        for place in (folder, packed)
    ]
    for kind in ("points", "normals", "colors", "is_colored"):
        assert torch.equal(*(getattr(pictures, kind) for pictures in made))

"""Where files are damaged, a batch still follows from (seed, step) alone: in any order, on any number of ranks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.training_data import R, prepared, write_latents
from training.data import damaged_files
from training.data.damaged_files import TooManyDamagedError
from training.data.datasets import Shapes, Structures, StructureViews
from training.data.device_pictures import DevicePictures, PictureChoices
from training.data.latent_views import LatentViews
from training.data.loading import load_batches
from training.data.parts import Part, Parts
from training.data.shape_files import latent_path, list_shapes, shape_path
from training.data.views import Views
from training.distributed import Ranks

CPU = torch.device("cpu")
STEPS = 5
KINDS = ["shapes", "structures", "structure_views", "picture_choices", "latent_views"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> str:
    """Data of which a shape, some latents, a picture, and all pictures of a shape are damaged."""
    data = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(prepared(tmp_path_factory), data)
    write_latents(data)
    names, tokens = list_shapes(data, "train", R)
    largest = names[int(tokens.argmax())]
    others = [name for name in names if name != largest]
    pictures = Path(data, "views")
    for path in (
        shape_path(data, R, largest),
        *(latent_path(data, R, largest, symmetry) for symmetry in range(8)),
        *(latent_path(data, R, others[0], symmetry) for symmetry in (0, 5)),
        pictures / others[1] / "001.png",
        *(pictures / others[2] / file for file in ("000.png", "001.png")),
    ):
        path.write_bytes(path.read_bytes()[:-40])
    return str(data)


def make(kind: str, data_dir: str, memory_gib: float = 0.0):
    names, tokens = list_shapes(data_dir, "train", R)
    if kind == "shapes":
        return Shapes(data_dir, "train", (R,), 6, 10_000, 0, (0, 3, 5))
    if kind == "structures":
        return Structures(data_dir, names, R, 6, 0, (0, 4), tokens, memory_gib)
    views = Views(data_dir, names, 28, augment=False)
    if kind == "latent_views":
        return LatentViews(data_dir, R, views, tokens, 6, 2, 10_000, 0, memory_gib=memory_gib)
    structures = Structures(data_dir, names, R, 1, 0)
    if kind == "structure_views":
        return StructureViews(views, 6, 2, 0, structures, with_grids=True)
    DevicePictures(views, CPU, 0)
    return PictureChoices(views, 6, 2, 0, structures, with_grids=True)


def tensors(batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [field for field in batch if isinstance(field, torch.Tensor)]


def same(one, two) -> bool:
    pairs = list(zip(tensors(one), tensors(two), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_does_not_depend_on_what_was_read_before(damaged, monkeypatch, kind):
    monkeypatch.setattr(damaged_files, "SHARE", 0.9)
    expected = [make(kind, damaged)[step] for step in range(STEPS)]  # of datasets that know of no damage yet
    backwards, held = make(kind, damaged), make(kind, damaged, memory_gib=1.0)
    for step in reversed(range(STEPS)):
        assert same(backwards[step], expected[step]) and same(held[step], expected[step])
    for step, batch in enumerate(load_batches(make(kind, damaged), 0, STEPS, 2, CPU)):
        assert same(batch, expected[step])


def noise_of(part: Part, number: int, draw) -> torch.Tensor:
    return draw(part, number, lambda n: torch.randn((n, 2), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_same_samples_and_noise_on_any_number_of_ranks(damaged, monkeypatch, kind):
    monkeypatch.setattr(damaged_files, "SHARE", 0.9)
    is_packed, shrunk = kind in ("shapes", "latent_views"), False
    for step in range(STEPS):
        dataset = make(kind, damaged)
        whole = Parts(dataset, Ranks(CPU), 1)[step]
        size = len(tensors(whole.batch)[0])
        shrunk |= is_packed and whole.cut is not None
        noise = noise_of(whole, size, Part.draw_tokens if is_packed else Part.draw_samples)
        seen = 0
        for ranks, accumulate in ((1, 3), (2, 2)):
            for rank in range(ranks):
                parts = Parts(make(kind, damaged), Ranks(CPU, rank, ranks), accumulate)
                for index in range(step * accumulate, (step + 1) * accumulate):
                    part = parts[index]
                    if is_packed:
                        start = torch.isin(whole.batch[0][:, 0], part.cut.samples).nonzero()[:, 0]
                        drawn = noise_of(part, len(start), Part.draw_tokens)
                    else:
                        start = part.cut.samples
                        drawn = noise_of(part, len(start), Part.draw_samples)
                    seen += len(start)
                    assert torch.equal(drawn, noise[start])
                    skipped = 1 if is_packed else 0  # the coordinates have the number of the sample in its part
                    for a, b in zip(tensors(part.batch)[skipped:2], tensors(whole.batch)[skipped:2], strict=True):
                        assert torch.equal(a, b[start])
        assert seen == 2 * size
    assert shrunk == is_packed


def test_a_shape_without_a_picture_that_can_be_read_is_replaced(damaged, monkeypatch, capsys):
    monkeypatch.setattr(damaged_files, "SHARE", 0.9)
    names, _ = list_shapes(damaged, "train", R)
    views = Views(damaged, names, 28, augment=False)
    dataset = StructureViews(views, 8, 1, 0)
    shown = torch.cat([dataset[step].shapes for step in range(4)])
    blind = [i for i in range(4) if not any(_is_whole(path) for path in views.files[i])]
    assert len(blind) == 1 and blind[0] not in shown.tolist() and len(set(shown.tolist())) == 3
    assert capsys.readouterr().err.count("damaged picture") == 3
    monkeypatch.setattr(damaged_files, "SHARE", 0.01)
    with pytest.raises(TooManyDamagedError, match="2 of 8 are damaged or missing, and at most 1 are skipped"):
        [StructureViews(Views(damaged, names, 28), 8, 1, 0)[step] for step in range(4)]


def _is_whole(path: Path) -> bool:
    return path.read_bytes().endswith(b"IEND" + np.uint32(0xAE426082).byteswap().tobytes())

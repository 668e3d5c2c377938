"""Order, blocks, neighbours, windows and grids of `Voxels`, against plain Python on sets of coordinates."""

import gc
import itertools
import pickle
import weakref

import pytest
import torch

from d3ds2.geometry import neighbors
from d3ds2.geometry.per_grid import per_grid
from d3ds2.geometry.position_embedding import absolute_position_embedding
from d3ds2.geometry.voxels import Voxels
from tests.support.random_voxels import random_coords, random_voxels


def sort_key(row):
    b, x, y, z = row
    return b, x // 8, y // 8, z // 8, x % 8, y % 8, z % 8


@pytest.fixture(params=[([300, 0, 1, 150], 20), ([700], 24), ([40, 60], 8)], ids=["ragged", "one", "one-block"])
def voxels(request):
    return random_voxels(*request.param)


def test_sort_orders_by_sample_block_place():
    coords = random_coords([200, 100], 40)
    voxels, order = Voxels.sort(coords, 40)
    assert voxels.coords.tolist() == sorted(coords.tolist(), key=sort_key)
    assert torch.equal(coords[order], voxels.coords)
    assert Voxels(voxels.coords, 40, 2).counts == [200, 100]


def test_samples_and_blocks(voxels):
    rows = voxels.coords.tolist()
    assert voxels.counts == [sum(r[0] == b for r in rows) for b in range(voxels.batch_size)]
    blocks = sorted({(b, x // 8, y // 8, z // 8) for b, x, y, z in rows})
    assert [tuple(b) for b in voxels.block_coords.tolist()] == blocks
    assert [blocks[i] for i in voxels.block_of_token] == [(b, x // 8, y // 8, z // 8) for b, x, y, z in rows]
    sizes = voxels.block_offsets.diff().tolist()
    assert sizes == [sum((b, x // 8, y // 8, z // 8) == block for b, x, y, z in rows) for block in blocks]
    assert voxels.block_counts == [sum(block[0] == b for block in blocks) for b in range(voxels.batch_size)]


def test_neighbors(voxels):
    rows = {tuple(r): i for i, r in enumerate(voxels.coords.tolist())}
    table = voxels.neighbors
    for k in range(27):
        dx, dy, dz = k // 9 - 1, k // 3 % 3 - 1, k % 3 - 1
        expected = [rows.get((b, x + dx, y + dy, z + dz), len(voxels)) for b, x, y, z in rows]
        assert table[k].tolist() == expected


@pytest.mark.parametrize("factor", [2, 4])
def test_coarsen(voxels, factor):
    coarse, parent = voxels.coarsen(factor)
    expected = {(b, x // factor, y // factor, z // factor) for b, x, y, z in voxels.coords.tolist()}
    assert [tuple(r) for r in coarse.coords.tolist()] == sorted(expected, key=sort_key)
    parents = [[b, x // factor, y // factor, z // factor] for b, x, y, z in voxels.coords.tolist()]
    assert coarse.coords[parent].tolist() == parents
    assert (coarse.resolution, coarse.batch_size) == (voxels.resolution // factor, voxels.batch_size)
    Voxels(coarse.coords, coarse.resolution, coarse.batch_size)  # sorted and inside


def test_subdivide_inverts_coarsen(voxels):
    fine, parent = voxels.subdivide()
    assert len(fine) == 8 * len(voxels) and fine.resolution == 2 * voxels.resolution
    Voxels(fine.coords, fine.resolution, fine.batch_size)
    coarse, again = fine.coarsen(2)
    assert torch.equal(coarse.coords, voxels.coords) and torch.equal(again, parent)
    child = voxels.child_order % 8
    place = torch.stack([child // 4, child // 2 % 2, child % 2], dim=1)
    assert torch.equal(fine.coords[:, 1:], (2 * voxels.coords[voxels.child_order // 8, 1:] + place).int())


def test_neighbors_of_children_follow_from_the_parents(voxels):
    fine = voxels.subdivide()[0].subdivide()[0]
    searched = Voxels(fine.coords, fine.resolution, fine.batch_size)
    assert torch.equal(fine.neighbors, searched.neighbors)


@pytest.mark.parametrize("shift", [0, 4])
def test_windows(voxels, shift):
    windows = voxels.windows(shift)
    rows = voxels.coords if windows.order is None else voxels.coords[windows.order]
    groups = [tuple(g) for g in torch.cat([rows[:, :1], (rows[:, 1:] + shift) // 8], 1).tolist()]
    starts = windows.cu_seqlens.tolist()
    ids = [set(groups[a:b]) for a, b in itertools.pairwise(starts)]
    assert all(len(i) == 1 for i in ids) and len(set.union(*ids)) == len(ids)
    assert windows.lengths == windows.cu_seqlens.diff().tolist() and starts[-1] == len(voxels)
    if windows.order is not None:
        assert torch.equal(windows.order[windows.inverse], torch.arange(len(voxels)))


def test_cat_repeat_and_sample(voxels):
    twice = voxels.repeat(2)
    assert twice.batch_size == 2 * voxels.batch_size and twice.counts == voxels.counts * 2
    Voxels(twice.coords, twice.resolution, twice.batch_size)
    samples = [twice.sample(i) for i in range(twice.batch_size)]
    assert torch.equal(Voxels.cat(samples).coords, twice.coords)


def test_empty():
    voxels = Voxels(torch.zeros(0, 4, dtype=torch.int32), 16, 2)
    assert voxels.counts == [0, 0] and voxels.neighbors.shape == (27, 0) and len(voxels.subdivide()[0]) == 0
    assert voxels.windows(4).lengths == [] and len(voxels.coarsen(4)[0]) == 0


def test_position_embedding_is_cached_and_scaled(voxels):
    embedding = voxels.position_embedding(64, 0.5)
    assert embedding is voxels.position_embedding(64, 0.5)
    torch.testing.assert_close(embedding, absolute_position_embedding(voxels.coords[:, 1:] * 0.5, 64))
    x = voxels.coords[:, 1].double() * 0.5
    torch.testing.assert_close(embedding[:, 0].double(), x.sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(embedding[:, 10].double(), x.cos(), atol=1e-6, rtol=0)
    assert embedding[:, 60:].eq(0).all()


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        pytest.param([[0, 8, 0, 0], [0, 0, 0, 0]], "sorted", id="out-of-order"),
        pytest.param([[0, 1, 1, 1], [0, 1, 1, 1]], "without repeats", id="twice"),
        pytest.param([[0, 16, 0, 0]], "below", id="outside-the-grid"),
        pytest.param([[1, 0, 0, 0]], "below", id="outside-the-batch"),
        pytest.param([[0, 0, -1, 0]], "below", id="negative"),
        pytest.param([[0, 0, 0]], r"\(N, 4\)", id="three-columns"),
    ],
)
def test_bad_coords_are_named(coords, message):
    with pytest.raises(ValueError, match=message):
        Voxels(torch.tensor(coords, dtype=torch.int32), 16, 1)
    with pytest.raises(ValueError, match="int32"):
        Voxels(torch.zeros(1, 4), 16, 1)


def test_coarsen_needs_a_divisor(voxels):
    with pytest.raises(ValueError, match="divides the resolution"):
        voxels.coarsen(7)


def test_neighbors_follow_from_a_coarser_grid(voxels):
    expected = Voxels(voxels.coords, voxels.resolution, voxels.batch_size).neighbors
    voxels.coarsen(2)[0].coarsen(2)
    assert torch.equal(voxels.neighbors, expected)


def test_neighbors_searched_a_few_at_a_time(voxels, monkeypatch):
    expected = voxels.neighbors
    monkeypatch.setattr(neighbors, "SEARCH_CHUNK", 5 * len(voxels))
    assert torch.equal(Voxels(voxels.coords, voxels.resolution, voxels.batch_size).neighbors, expected)


@per_grid
def lowest(voxels, axis, factor=1):
    """A free function whose results have their own table."""
    return voxels.coords[:, 1 + axis].amin() * factor


def test_results_are_kept_under_their_function_and_arguments(voxels):
    assert voxels.windows(4) is voxels.windows(4, 8) is voxels.windows(size=8, shift=4)
    assert voxels.windows(4) is not voxels.windows(0)
    assert voxels.windows(4) is voxels.tables[Voxels.windows.key(4)]
    assert voxels.neighbors is voxels.tables[Voxels.neighbors.key()]
    assert lowest(voxels, 0) is lowest(voxels, axis=0, factor=1) is voxels.tables[lowest.key(0)]
    assert lowest(voxels, 0) is not lowest(voxels, 1)
    with pytest.raises(TypeError, match="axis"):
        lowest(voxels)


def test_prepared_voxels_are_pickled_and_mapped_with_their_tables(voxels):
    prepared = voxels.prepared()
    prepared.coarse_counts(2)  # also makes a table of the coarser voxels, which `map` leaves out
    for copy in (pickle.loads(pickle.dumps(voxels.prepared())), prepared.map(torch.clone)):
        assert Voxels.coarsen.key(2) not in copy.tables
        assert torch.equal(copy.tables[Voxels.neighbors.key()], voxels.neighbors) and copy.counts == voxels.counts
        assert copy.neighbors is copy.tables[Voxels.neighbors.key()] and copy.neighbors is not prepared.neighbors
        windows, expected = copy.windows(4), voxels.windows(4)
        assert torch.equal(windows.order, expected.order) and torch.equal(windows.inverse, expected.inverse)


def test_finer_voxels_do_not_keep_the_coarser_ones():
    coarse = random_voxels([20], 16)
    fine, alive = coarse.subdivide()[0], weakref.ref(coarse)
    expected = Voxels(fine.coords, fine.resolution, fine.batch_size).neighbors
    gc.disable()  # so that a reference cycle would keep it alive
    try:
        del coarse
        assert alive() is None
    finally:
        gc.enable()
    assert torch.equal(fine.neighbors, expected)

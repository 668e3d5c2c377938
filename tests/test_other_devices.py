"""Everything runs on a device that is neither a CPU nor CUDA, and computes what a CPU computes."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from d3ds2.geometry.attention_plan import attention_plan, cells_of
from d3ds2.geometry.sdf_blocks import SDFBlocks
from d3ds2.geometry.segments import samples_of, tokens_of_cells
from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels import devices
from d3ds2.kernels.block_scores import select_blocks
from d3ds2.kernels.compression import pooled_conv_compression, pooled_silu
from d3ds2.kernels.gather_conv import children_weight, gather_conv, permute_rows, submanifold_conv, take_rows
from d3ds2.kernels.group_norm import packed_group_norm
from d3ds2.kernels.modulation import affine_norm, gated_sum, sum_and_norm
from d3ds2.kernels.packed_attention import packed_attention, packed_attention_with_lse
from d3ds2.kernels.segment_sum import per_token, sample_means, segment_sum, take_segments
from d3ds2.kernels.selection_attention import selection_attention
from d3ds2.kernels.spatial_sparse_attention import spatial_sparse_attention
from d3ds2.kernels.volume_conv import adaptive_conv, channel_moments, volume_conv
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention
from d3ds2.networks.refined_blocks import refine_surface
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from d3ds2.pipeline import load_pipeline
from tests.support.other_device import OtherTensor, other_device
from tests.support.random_voxels import random_voxels
from tests.support.tiny_model import draw_object

CPU = torch.device("cpu")
KINDS = ["mps", "xpu", "privateuseone"]


@pytest.fixture(params=KINDS)
def device(request):
    with other_device(request.param) as device:
        yield device


def to(x, device):
    """Copy tensors and voxels to a device, also those in lists; tensors of floats ask for a gradient."""
    if isinstance(x, Tensor):
        return x.detach().to(device).requires_grad_(x.is_floating_point())
    if isinstance(x, Voxels):
        return x.to(device)
    return [to(part, device) for part in x] if isinstance(x, list) else x


def tensors_of(x) -> list[Tensor]:
    return [tensor for part in x for tensor in tensors_of(part)] if isinstance(x, list | tuple) else [x]


def results(function, inputs: list, device: torch.device, backward: bool) -> list[Tensor]:
    """Call a function on copies of the inputs; return its results and, if asked, the gradients of the inputs."""
    inputs = [to(x, device) for x in inputs]
    with torch.set_grad_enabled(backward):
        found = tensors_of(function(*inputs))
    assert all(isinstance(x, OtherTensor) == (device != CPU) for x in found)
    if not backward:
        return found
    sum((x.float() * (x.float() + 1)).sum() for x in found if x.requires_grad).backward()
    wanted = [x for x in tensors_of(inputs) if isinstance(x, Tensor) and x.requires_grad]
    assert any(x.grad is not None for x in wanted)
    return found + [x.grad for x in wanted if x.grad is not None]


def assert_same(device: torch.device, function, *inputs, backward: bool = True) -> None:
    torch.manual_seed(1)
    expected = results(function, list(inputs), CPU, backward)
    torch.manual_seed(1)
    actual = results(function, list(inputs), device, backward)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach().cpu(), e.detach().to(a.dtype), rtol=1e-4, atol=1e-4)


# the device itself


def test_the_device_refuses_what_a_mac_refuses(device):
    x = torch.ones(2, 3, device=device)
    assert not x.is_cpu and not x.is_cuda and x.device == device
    refused = {
        "_to_copy": lambda: x.double(),
        "numpy": lambda: x.numpy(),
        "add.Tensor": lambda: x + torch.ones(2, 3),
        "index.Tensor": lambda: torch.ones(2)[torch.zeros(2, dtype=torch.long, device=device)],
        "_flash_attention_for_cpu": lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(torch.ones(1, 1, 2, 8, device=device),) * 3
        ),
    }
    for operator, call in refused.items():
        with pytest.raises(RuntimeError, match=operator):
            call()
    assert (x * 2.5 + torch.tensor(1)).sum().item() == 21 and torch.equal(x.cpu(), torch.ones(2, 3))


@pytest.mark.parametrize("kind", [*KINDS, "cpu", "cuda", "meta"])
def test_autocast_can_be_off_on_every_device(kind):
    where = torch.device(kind)
    assert devices.autocast_dtype(where) is None
    with devices.without_autocast(where):
        pass
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (devices.autocast_dtype(where) is not None) == (kind == "cpu")
        with devices.without_autocast(CPU):
            assert devices.autocast_dtype(CPU) is None


# kernels

N, SAMPLES = 90, [50, 0, 40]


def voxels_of(device: torch.device) -> Voxels:
    return random_voxels(SAMPLES, 24).to(device)


def heads(number: int, rows: int = N, channels: int = 8) -> Tensor:
    return torch.randn(rows, number, channels)


def on_voxels(make_plan, function):
    """Return the function with what `make_plan` takes from voxels on the device of the first argument."""
    return lambda x, *more: function(make_plan(voxels_of(tensors_of(x)[0].device)), x, *more)


def attend(function):
    lengths_q, lengths_k = [50, 0, 40], [30, 7, 0]

    def call(q, k, v):
        offsets = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device=q.device) for n in (lengths_q, lengths_k)]
        return function(q, k, v, *offsets, lengths_q, lengths_k)

    return call


def select(voxels, q, compressed_k, lse):
    plan = attention_plan(voxels, 8, 8, 4)
    counts = plan.samples.lengths, plan.compressed.lengths, plan.block_counts
    return select_blocks(q, compressed_k, lse, plan.block_of_compressed, *counts, 3)


def attend_to_blocks(voxels, q, k, v):
    plan = attention_plan(voxels, 8, 8, 4)
    M = len(plan.blocks)
    first = torch.arange(N, device=q.device)[:, None, None] % (M - 2)
    chosen = first + torch.tensor([[0, 1], [0, 2]], device=q.device)  # two blocks for each of two heads
    return selection_attention(q, k, v, plan.blocks.offsets, chosen.int())


def blocks(rows: int = N) -> int:
    return len(attention_plan(voxels_of(CPU), 8, 8, 4).blocks)


def convolve(voxels, x, weight, bias):
    children = 1 if len(weight) == 27 else 8
    return submanifold_conv(x, voxels.neighbors, weight, bias, children)


def same(x):
    return x


SIZE = (4, 5, 6)  # of a volume
V = 4 * 5 * 6
PARAMETERS = [torch.randn(8) for _ in range(12)] + [torch.randn(27, 8, 8) for _ in range(4)]
KERNELS = {
    "attention": (attend(packed_attention), heads(4), heads(2, 37), heads(2, 37)),
    "attention with lse": (attend(packed_attention_with_lse), heads(4), heads(2, 37), heads(2, 37)),
    "selection": (on_voxels(same, attend_to_blocks), heads(4), heads(2), heads(2)),
    "sparse attention": (
        on_voxels(
            lambda voxels: attention_plan(voxels, 8, 8, 4),
            lambda plan, *inputs: spatial_sparse_attention(*inputs, plan, 2),
        ),
        heads(4),
        heads(2),
        heads(2),
        heads(2, blocks()),
        heads(2, blocks()),
        torch.rand(N, 3),
    ),
    "convolution": (on_voxels(same, convolve), torch.randn(N, 4), torch.randn(27, 4, 8), torch.randn(8)),
    "convolution to children": (on_voxels(same, convolve), torch.randn(N, 4), torch.randn(64, 4, 8), torch.randn(8)),
    "children's weights": (children_weight, torch.randn(27, 4, 8)),
    "permutation": (lambda x: permute_rows(x, torch.arange(N, device=x.device).flip(0)), torch.randn(N, 4)),
    "group norm": (
        on_voxels(samples_of, lambda samples, x, w, b: packed_group_norm(x, w, b, samples, 4, 1e-5, silu=True)),
        torch.randn(N, 8),
        torch.randn(8),
        torch.randn(8),
    ),
    "sum and norm": (
        on_voxels(samples_of, lambda samples, h, *given: sum_and_norm(h, *given, samples, 1e-6)[1]),
        torch.randn(N, 8),
        torch.randn(3, 8),
        torch.randn(N, 8),
        torch.randn(3, 8),
        torch.randn(3, 8),
    ),
    "affine norm": (partial(affine_norm, eps=1e-6), torch.randn(N, 8), torch.randn(8), torch.randn(8)),
    "gated sum": (
        on_voxels(samples_of, lambda samples, h, gate, x: gated_sum(h, gate, x, samples)),
        torch.randn(N, 8),
        torch.randn(3, 8),
        torch.randn(N, 8),
    ),
    "pooled SiLU": (
        on_voxels(lambda voxels: cells_of(voxels, 8), lambda cells, x: pooled_silu(x, cells)),
        torch.randn(2, N, 8),
    ),
    "compression": (
        on_voxels(
            lambda voxels: cells_of(voxels, 4),
            lambda cells, k, v, position, parameters: pooled_conv_compression(
                k, v, position, parameters, cells, 4, 1e-5, torch.float32
            ),
        ),
        torch.randn(N, 8),
        torch.randn(N, 8),
        torch.randn(64, 8),
        PARAMETERS,
    ),
    "sums of segments": (
        on_voxels(same, lambda voxels, x: segment_sum(x, tokens_of_cells(voxels, 8), voxels.coarsen(8)[1])),
        torch.randn(N, 8),
    ),
    "rows of segments": (
        on_voxels(same, lambda voxels, x: take_segments(x, tokens_of_cells(voxels, 8), voxels.coarsen(8)[1])),
        torch.randn(blocks(), 8),
    ),
    "means of samples": (on_voxels(samples_of, lambda samples, x: sample_means(x, samples)), torch.randn(N, 8)),
    "rows of samples": (on_voxels(samples_of, lambda samples, x: per_token(x, samples)), torch.randn(3, 8)),
}
WITHOUT_GRADIENTS = {
    "selected blocks": (on_voxels(same, select), heads(4), heads(2, blocks()), torch.randn(N, 4)),
    "rows": (lambda x: take_rows(x, torch.arange(0, N, 7, device=x.device)), torch.randn(N, 4)),
    "gathered convolution": (
        on_voxels(same, lambda voxels, x, w, b: gather_conv(x, voxels.neighbors[:, 3:20], w, b)),
        torch.randn(N, 4),
        torch.randn(27, 4, 16),
        torch.randn(8),
    ),
    "tiles": (on_voxels(samples_of, lambda samples, x: samples.tiles(16)), torch.randn(N)),
    "moments": (channel_moments, torch.randn(V, 8)),
    "convolution of a volume": (
        lambda x, w, b, y, scale, shift, r: volume_conv(x, SIZE, w, b, y, (scale, shift), r),
        *(torch.randn(size) for size in ((V, 3), (8, 5, 3, 3, 3), (8,), (V, 2), (5,), (5,), (V, 8))),
    ),
    "adaptive convolution": (lambda x, w: adaptive_conv(x, SIZE, w), torch.randn(V, 8), torch.randn(V, 27)),
}


@pytest.mark.parametrize("name", [*KERNELS, *WITHOUT_GRADIENTS])
def test_kernels(name, device):
    backward = name in KERNELS
    assert_same(device, *(KERNELS if backward else WITHOUT_GRADIENTS)[name], backward=backward)


# geometry, layers and networks


def test_geometry(device):
    def tables(coords):
        voxels, order = Voxels.sort(coords, 24, 3)
        fine, parent = voxels.subdivide()
        windows = voxels.windows(4)
        found = [order, voxels.coords, voxels.neighbors, fine.coords, fine.neighbors, parent, windows.order]
        found += [*voxels.coarsen(2), voxels.slots, voxels.repeat(2).block_coords, voxels.sample(2).coords]
        found = [x.coords if isinstance(x, Voxels) else x for x in found]
        return [*found, voxels.position_embedding(100, 3.5), *samples_of(voxels).tiles(16)]

    coords = voxels_of(CPU).coords.flip(0)
    assert_same(device, tables, coords, backward=False)
    assert voxels_of(device).counts == SAMPLES


def applied(make_module, *inputs: Tensor):
    """Return a function of the inputs and of a module's parameters, and the arguments for it."""
    torch.manual_seed(2)
    module = make_module()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    def call(parameters, *inputs):
        names = (name for name, _ in module.named_parameters())
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), inputs)

    return call, list(module.parameters()), *inputs


@pytest.mark.parametrize("pooled_conv", [True, False])
def test_spatial_sparse_attention(pooled_conv, device):
    call, *inputs = applied(
        lambda: SpatialSparseAttention(16, 4, 2, 4 if pooled_conv else 8, pooled_conv, 2, shift=4), torch.randn(N, 16)
    )
    attend = lambda parameters, x: call(parameters, x, voxels_of(x.device))  # noqa: E731
    assert_same(device, attend, *inputs)


SMALL = {"widths": (4, 8), "layers": 1, "middle_layers": 0}


def test_refiners(device):
    config = SignRefinerConfig(**SMALL, patch_size=8)
    assert_same(device, *applied(lambda: SignRefiner(config), torch.randn(1, 1, 8, 8, 8)))
    config = RefinerConfig(**SMALL, patch_size=8, feature_channels=4)
    volumes = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 4, 8, 8, 8)
    assert_same(device, *applied(lambda: Refiner(config), *volumes))


@pytest.mark.parametrize("signs", [True, False])
def test_refined_blocks(signs, device):
    config = SignRefinerConfig(**SMALL, patch_size=8) if signs else RefinerConfig(**SMALL, patch_size=24)
    refiner = SignRefiner(config) if signs else Refiner(config)
    coords = random_voxels([6], 3).coords
    coords = coords[torch.from_numpy(np.lexsort(coords.T[[3, 2, 1]].numpy()))]
    blocks = SDFBlocks(coords, torch.rand(6, 8, 8, 8) * 2 - 1, 24, 1)
    features = None if signs else torch.randn(6 * 512, config.feature_channels)
    expected = refine_surface(refiner, blocks, features, 0.1, CPU)
    actual = refine_surface(refiner.to(device), blocks, features, 0.1, device)
    torch.testing.assert_close(actual.values.cpu(), expected.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.coords.cpu(), expected.coords)


# the whole pipeline


def ball(radius: float) -> Voxels:
    """The voxels of the tiny model's grid that a sphere crosses."""
    places = torch.cartesian_prod(*[torch.arange(32)] * 3)
    crossed = ((places - 15.5).square().sum(1).sqrt() - radius).abs() < 0.9
    return Voxels.sort(torch.nn.functional.pad(places[crossed], (1, 0)), 32, 1)[0]


@torch.no_grad()
def generate(device: torch.device | str):
    """Run the shipped model: features of an image, structure, latents, SDF and mesh, the last three of a small ball."""
    pipeline = load_pipeline(device=device, dtype=torch.float32)
    tokens = pipeline.encode_image([draw_object()])
    structure = pipeline.sample_structure(tokens, [0], 1)
    voxels, sdf = ball(5.0), torch.linspace(-1, 1, len(ball(5.0)))[:, None]
    latents = pipeline.sample_latents(voxels, tokens, [0], 1)
    encoded = pipeline.stages[0].sdf_vae.encode(sdf.to(device), voxels.to(device))[0]
    blocks = pipeline.decode_blocks(latents, voxels)
    return tokens.features, structure, latents, encoded, blocks.values, pipeline.blocks_to_meshes(blocks)[0]


@pytest.fixture(scope="module")
def on_cpu():
    return generate("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_model_makes_the_same_mesh(kind, on_cpu):
    with other_device(kind) as device:
        *tensors, mesh = generate(device)
    *expected, mesh_on_cpu = on_cpu
    structures = [{*map(tuple, x.pop(1).coords.tolist())} for x in (tensors, expected)]
    assert len(structures[0] ^ structures[1]) < 0.001 * len(structures[1])
    for actual, wanted in zip(tensors, expected, strict=True):
        assert isinstance(actual, OtherTensor)
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-3, atol=1e-3)
    # rounding may choose the other diagonal of a quad, and so another order
    assert mesh.faces.shape == mesh_on_cpu.faces.shape and mesh.vertices.shape == mesh_on_cpu.vertices.shape
    for one, other in ((mesh, mesh_on_cpu), (mesh_on_cpu, mesh)):
        assert cKDTree(other.vertices).query(one.vertices)[0].max() < 1e-4

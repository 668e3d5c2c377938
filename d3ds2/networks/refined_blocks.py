"""The refiners over a whole volume: a decoded SDF -> the 8³ blocks that the refined surface crosses.

A refiner works on patches of the size that it was trained on, because its norms average over a patch. The patches are
processed one by one. The largest dense tensor is a single volume: distances in `refine_distances`, signs at half the
resolution in `refine_signs`. Where nothing was decoded, the released models assume +1, inside the solid and outside.

Sizes named in this file:
    N  decoded voxels of one sample      R  voxels per edge      G = R / 8  blocks per edge
    P  voxels per edge of a patch        D  channels of the decoder's features      M  blocks
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry.sdf_blocks import SDFBlocks
from ..geometry.voxels import BLOCK, Voxels
from .refiner import Refiner, SignRefiner

OVERLAP = 6  # neighbouring patches of `refine_distances` overlap by P / 6 voxels, where they are blended

OnPatch = Callable[[int, int], None]  # finished patches, all patches


@torch.no_grad()
def refine_distances(
    refiner: Refiner, sdf: Tensor, features: Tensor, voxels: Voxels, on_patch: OnPatch | None = None
) -> Tensor:
    """Refine the distances of a whole volume.

    Args:
        refiner: on the device of the other arguments.
        sdf: (N, 1) decoded distances in [-1, 1].
        features: (N, D) of the decoder.
        voxels: one sample at resolution R, which patches that overlap by P / 6 must cover evenly.
        on_patch: called after every patch; may raise to stop.

    Returns:
        (R, R, R) float32 in (-1, 1), negative inside, indexed [x, y, z].

    Raises:
        ValueError: if there is more than one sample, or patches do not cover the grid evenly.
    """
    R, P = voxels.resolution, refiner.config.patch_size
    starts = _starts(R, P, P - P // OVERLAP)
    dtype = refiner.input_conv.weight.dtype
    embedded = torch.cat([refiner.embed_features(rows.to(dtype)) for rows in features.split(1 << 20)])  # (N, C)
    nothing = refiner.embed_features(features.new_zeros(1, features.shape[1], dtype=dtype))[0]  # (C,)
    volume = torch.zeros(R, R, R, device=sdf.device)
    ramps = [_ramp(start, starts, P, sdf.device) for start in starts]
    for done, (ix, iy, iz) in enumerate(product(range(len(starts)), repeat=3)):
        corner = torch.tensor([starts[ix], starts[iy], starts[iz]], dtype=torch.int32, device=sdf.device)
        rows, place = _inside(voxels, corner, P)
        patch = sdf.new_ones(P**3, dtype=dtype).index_copy(0, place, sdf[rows, 0].to(dtype))
        seen = nothing[:, None].repeat(1, P**3).index_copy_(1, place, embedded[rows].t())
        refined = refiner(patch.view(1, 1, P, P, P), seen.view(1, -1, P, P, P))[0, 0].float()
        refined *= ramps[ix][:, None, None] * ramps[iy][:, None] * ramps[iz]
        x, y, z = (slice(start, start + P) for start in (starts[ix], starts[iy], starts[iz]))
        volume[x, y, z] += refined
        if on_patch is not None:
            on_patch(done + 1, len(starts) ** 3)
    return volume


@torch.no_grad()
def refine_signs(refiner: SignRefiner, sdf: Tensor, voxels: Voxels, on_patch: OnPatch | None = None) -> Tensor:
    """Find out which cells of 2³ voxels are outside. The result is for places where nothing was decoded.

    Arguments and errors as for `refine_distances`. Patches lie on the grid of R / 2 and overlap by P / 2, where a later
    patch replaces an earlier one.

    Returns:
        (R/2, R/2, R/2) bool, True outside.
    """
    R, P = voxels.resolution, refiner.config.patch_size
    starts = _starts(R // 2, P, P // 2)
    dtype = refiner.input_conv.weight.dtype
    coarse = _mean_of_cells(sdf, voxels, dtype)  # (R/2, R/2, R/2)
    del sdf, voxels
    outside = torch.empty(R // 2, R // 2, R // 2, dtype=torch.bool, device=coarse.device)
    for done, corner in enumerate(product(starts, repeat=3)):
        x, y, z = (slice(start, start + P) for start in corner)
        outside[x, y, z] = refiner(coarse[x, y, z][None, None])[0, 0] >= 0
        if on_patch is not None:
            on_patch(done + 1, len(starts) ** 3)
    return outside


def refine_surface(
    refiner: Refiner | SignRefiner,
    blocks: SDFBlocks,
    features: Tensor | None,
    level: float,
    device: torch.device,
    on_patch: OnPatch | None = None,
) -> SDFBlocks:
    """Refine each sample; return the blocks that the refined surface crosses, possibly none.

    Args:
        refiner: on `device`; a `SignRefiner` where `features` is None.
        blocks: decoded.
        features: (512 M, D) of the decoder, in the order of the blocks.
        level: value of the SDF on the refined surface.
        device: where the work is done.
        on_patch: called with the finished and all patches of a sample; may raise to stop.

    Raises:
        ValueError: if patches do not cover the grid evenly.
    """
    first, coords, values = 0, [], []
    for index, count in enumerate(blocks.counts):
        some = slice(first, first + count)
        own = blocks.coords[some] * blocks.coords.new_tensor([0, 1, 1, 1])
        sample = SDFBlocks(own.to(device), blocks.values[some].to(device), blocks.resolution, 1)
        if features is None:
            outside = refine_signs(refiner, *sample.to_voxels(), on_patch)
            # the voxels are made twice: kept while refining, they would be the largest tensor
            crossed = blocks_of_signs(*sample.to_voxels(), outside, level)
            del outside
        else:
            rows = features[BLOCK**3 * first : BLOCK**3 * (first + count)].to(device)
            crossed = blocks_of_distances(
                refine_distances(refiner, sample.values.reshape(-1, 1), rows, sample.to_voxels()[1], on_patch), level
            )
        coords.append(F.pad(crossed[0].int(), (1, 0), value=index))
        values.append(crossed[1])
        first += count
    return SDFBlocks(torch.cat(coords), torch.cat(values), blocks.resolution, blocks.batch_size)


def blocks_of_distances(volume: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the blocks of a volume (R, R, R) that hold an end of a grid edge which crosses `level`.

    The result is block coordinates (M, 3) long and values (M, 8, 8, 8), as `sdf_to_mesh` takes them.
    """
    return _crossed_blocks(lambda first, last: volume[first:last], len(volume), level)


def blocks_of_signs(sdf: Tensor, voxels: Voxels, outside: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return such blocks for a volume of decoded distances, sdf (N, 1), with signs where nothing was decoded.

    `outside` is the result of `refine_signs`; a sign is +1 where it is True, else -1.
    """
    return _crossed_blocks(lambda first, last: signed_slab(sdf, voxels, outside, first, last), voxels.resolution, level)


def signed_slab(sdf: Tensor, voxels: Voxels, outside: Tensor, first: int, last: int) -> Tensor:
    """Return layers first <= x < last of the volume of `blocks_of_signs`, (last - first, R, R) float32."""
    cells = outside[first // 2 : (last + 1) // 2]
    for dim in range(3):
        cells = cells.repeat_interleave(2, dim)
    slab = cells[first % 2 : first % 2 + last - first].float() * 2 - 1
    rows, place = _in_layers(voxels, first, last)
    slab.view(-1)[place] = sdf[rows, 0].float()
    return slab


def _starts(resolution: int, patch: int, stride: int) -> list[int]:
    if resolution < patch or (resolution - patch) % stride:
        raise ValueError(f"expected a grid that patches of {patch} every {stride} voxels cover, got {resolution}")
    return list(range(0, resolution - patch + 1, stride))


def _ramp(start: int, starts: list[int], patch: int, device: torch.device) -> Tensor:
    """Return the weight of a patch along an axis, (P,): it rises or falls linearly where neighbours overlap."""
    ramp, rise = torch.ones(patch, device=device), torch.linspace(0, 1, patch // OVERLAP, device=device)
    if start > starts[0]:
        ramp[: len(rise)] = rise
    if start < starts[-1]:
        ramp[-len(rise) :] = 1 - rise
    return ramp


def _inside(voxels: Voxels, corner: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Rows of the voxels in a patch, and their flat places in the patch."""
    if voxels.batch_size != 1:
        raise ValueError(f"expected one sample, got {voxels.batch_size}")
    place = voxels.coords[:, 1:] - corner
    rows = ((place >= 0) & (place < patch)).all(1).nonzero()[:, 0]
    x, y, z = place[rows].long().unbind(1)
    return rows, (x * patch + y) * patch + z


def _in_layers(voxels: Voxels, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Rows of the voxels with first <= x < last, and their flat places in these layers."""
    if voxels.batch_size != 1:
        raise ValueError(f"expected one sample, got {voxels.batch_size}")
    R = voxels.resolution
    ends = torch.tensor([first // BLOCK, -(-last // BLOCK)], dtype=torch.int32, device=voxels.device)
    blocks = torch.searchsorted(voxels.block_coords[:, 1].contiguous(), ends)  # sorted by x
    begin, end = voxels.block_offsets[blocks].tolist()
    x, y, z = voxels.coords[begin:end, 1:].long().unbind(1)
    kept = ((x >= first) & (x < last)).nonzero()[:, 0]
    return kept + begin, (((x - first) * R + y) * R + z)[kept]


def _mean_of_cells(sdf: Tensor, voxels: Voxels, dtype: torch.dtype = torch.float32) -> Tensor:
    """`mean_pool` by 2 as a volume (R/2, R/2, R/2), 1 in cells without voxels: sum / (count + 1)."""
    R = voxels.resolution
    means = torch.empty(R // 2, R // 2, R // 2, dtype=dtype, device=sdf.device)
    for first in range(0, R, BLOCK):
        rows, place = _in_layers(voxels, first, first + BLOCK)
        slab = torch.zeros(2, BLOCK * R * R, device=sdf.device)  # values, and 1 for each voxel
        slab[0, place], slab[1, place] = sdf[rows, 0].float(), 1.0
        total, count = F.avg_pool3d(slab.view(2, 1, BLOCK, R, R), 2)[:, 0] * 8
        means[first // 2 : (first + BLOCK) // 2] = torch.where(count > 0.5, total / (count + 1), 1.0)
    return means


def _crossed_blocks(slab: Callable[[int, int], Tensor], resolution: int, level: float) -> tuple[Tensor, Tensor]:
    """Return the crossed blocks of the volume whose layers `slab(first, last)` returns; beyond the grid is outside."""
    found = [*_crossed_in_layers(slab, resolution, level)]
    coords, values = zip(*found, strict=True)
    return torch.cat(coords), torch.cat(values)


def _crossed_in_layers(
    slab: Callable[[int, int], Tensor], resolution: int, level: float
) -> Iterator[tuple[Tensor, Tensor]]:
    R, G = resolution, resolution // BLOCK
    for bx in range(G):
        first, last = max(BLOCK * bx - 1, 0), min(BLOCK * bx + BLOCK + 1, R)
        layers = slab(first, last)  # with one layer of the neighbours on either side
        inside = layers < level
        has_outside = (~inside).any(0).float()
        if first == 0 or last == R:
            has_outside.fill_(1.0)
        sides = torch.stack([F.pad(inside.any(0).float(), (1,) * 4), F.pad(has_outside, (1,) * 4, value=1.0)])
        y, z = F.max_pool2d(sides[:, None], BLOCK + 2, BLOCK)[:, 0].amin(0).nonzero().unbind(1)  # those with both
        core = layers[BLOCK * bx - first :][:BLOCK].unflatten(2, (G, BLOCK)).unflatten(1, (G, BLOCK))
        yield torch.stack([torch.full_like(y, bx), y, z], dim=1), core.permute(1, 3, 0, 2, 4)[y, z]

"""Decode latents to an SDF in bounded memory: the same numbers as `SDFVAE.decode`, in pieces.

The transformer runs on a few windows at a time, because the result of a window depends on that window alone. The
convolutions that follow run on boxes of latents, which do not overlap and together hold every latent. A box is halved
until it fits the memory.

The SDF voxels of a latent depend on latents at most three away. From the edge of a box, the six convolutions reach 1
voxel at R, 1 + 1 at R/2, 1 + 1 at R/4 and 1 latent. So a box needs features of

    cells at R/2 up to 2 beyond its edge, cells at R/4 up to 3 beyond, and latents up to 3 beyond,

and no others are computed.

Sizes named in this file:
    L  latents, all samples packed      C  hidden size
    N  cells of one level in one chunk  P  the needed ones among them or their children
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry.neighbors import CELL_OFFSET, CHILD
from ..geometry.position_embedding import absolute_position_embedding
from ..geometry.sdf_blocks import SDFBlocks
from ..geometry.voxels import Voxels
from ..geometry.windows import Windows
from ..kernels.device_constant import device_constant
from ..kernels.gather_conv import gather_conv, workspace_bytes
from ..storage.one_line import OneLineError
from .sdf_vae import FACTOR, SDFVAE

HALO = 3  # latents beyond the edge of a box that its voxels depend on
MARGINS = (3, 3, 2)  # cells beyond that edge whose features are needed, at R/8, R/4 and R/2
CELLS = (FACTOR // 2) ** 3  # of a latent, at R/2
DEFAULT_BUDGET = 2 << 30  # bytes
MIN_SLICE = 1024  # cells or tokens at a time, at least

OnChunk = Callable[[int, int], None]  # takes the numbers of finished and of all latents


class MemoryBudgetError(OneLineError):
    """The budget is too small for the smallest possible chunk. The message says how much is enough."""


@torch.no_grad()
def decode_in_chunks(
    vae: SDFVAE,
    latents: Tensor,
    voxels: Voxels,
    memory_budget: int | None = None,
    position_factor: float | None = None,
    on_chunk: OnChunk | None = None,
    features_out: Tensor | None = None,
) -> SDFBlocks:
    """Decode without gradients, in as few chunks as the memory allows.

    Args:
        vae: on the device of the latents.
        latents: (L, E), as the encoder returns them (not normalised).
        voxels: their voxels at R / 8.
        memory_budget: bytes that decoding may take beside weights and latents, its result included. Default: 2 GiB.
        position_factor: as in `SDFVAE.decode`.
        on_chunk: called after each chunk with the numbers of finished and of all latents; may raise to stop.
        features_out: (512 L, C / 16), to be filled with the features before the output layer, in the order of
            `SDFBlocks.to_voxels`; not counted in the budget.

    Returns:
        The SDF, float32, on the device of the latents. Only its rounding depends on the chunks.

    Raises:
        ValueError: if latents and voxels do not fit together.
        MemoryBudgetError: if the budget is too small for any chunk.
    """
    config, L = vae.config, len(voxels)
    if latents.shape != (L, config.latent_channels):
        raise ValueError(f"expected latents ({L}, {config.latent_channels}), got {tuple(latents.shape)}")
    if position_factor is None:
        position_factor = config.position_resolution / (FACTOR * voxels.resolution)
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    if not 0 <= budget < 2**63:
        raise MemoryBudgetError(f"expected a memory budget in bytes, got {budget}")
    dtype = vae.decoder.input_layer.weight.dtype
    left = budget - kept_bytes(config.hidden_size, L, dtype, latents.device)
    boxes = chunk_boxes(voxels, max_latents(config.hidden_size, left // 2, dtype))
    if boxes is None:
        needed = budget - left + 2 * latent_bytes(config.hidden_size, dtype) * (2 * HALO + 1) ** 3
        raise MemoryBudgetError(f"expected a memory budget of at least {needed} bytes for {L} latents, got {budget}")

    slice_bytes = left // 2
    features = transform(vae, latents, voxels, position_factor, slice_bytes)  # (L, C)
    coords, order = _lexicographic(voxels)
    place = torch.empty_like(order)
    place[order] = torch.arange(L, device=order.device)  # row of each latent in the result
    values = torch.empty(L, FACTOR**3, device=latents.device)
    weights = [layer.dense_weights() for block in vae.decoder.up_blocks for layer in (block.conv1, block.conv2)]
    table, done = _Table(voxels), 0
    for low, high, inside in boxes:
        results = values.view(-1), features_out
        done += _decode_box(vae, weights, features, table, voxels, low, high, inside, place, results, slice_bytes)
        if on_chunk is not None:
            on_chunk(done, L)
    return SDFBlocks(coords, values.view(-1, FACTOR, FACTOR, FACTOR), FACTOR * voxels.resolution, voxels.batch_size)


def kept_bytes(hidden_size: int, latents: int, dtype: torch.dtype, device: torch.device) -> int:
    """Count the bytes kept through all chunks: features, neighbours, the result, and the weights as dense tensors.

    Those for the gathering of neighbours are among them.
    """
    weights = 27 * 8 * sum((hidden_size // n) ** 2 for n in (4, 8, 16)) * dtype.itemsize
    return workspace_bytes(device) + weights + latents * (hidden_size * dtype.itemsize + 27 * 4 + 4 * FACTOR**3 + 64)


def latent_bytes(hidden_size: int, dtype: torch.dtype) -> int:
    """Count the bytes that a chunk needs for each of its latents, those of the halo included."""
    C = hidden_size // 8
    features = dtype.itemsize * CELLS * (C + C + C // 2)  # at R/2, before and after the needed rows are taken
    neighbors = 27 * 4 * (1 + 8 + CELLS) + CELLS * (4 * 8)
    return features + neighbors


def max_latents(hidden_size: int, budget: int, dtype: torch.dtype) -> int:
    """Return how many latents, those of the halo included, a chunk may have within `budget` bytes."""
    return budget // latent_bytes(hidden_size, dtype)


def chunk_boxes(voxels: Voxels, limit: int) -> list[tuple[np.ndarray, np.ndarray, Tensor]] | None:
    """Cut the latents into boxes that hold at most `limit` latents, halo included.

    Returns:
        (low (4,), high (4,), rows) for each box. Every latent lies in exactly one box, the one with
        low <= [batch, x, y, z] < high; `rows` (N,) long are the latents in the box and in its halo. None if even the
        halo of a single latent holds too many.
    """
    coords = voxels.coords.cpu().numpy()
    if not len(coords):
        return []
    waiting = [(coords.min(0), coords.max(0) + 1, np.arange(len(coords)))]
    boxes = []
    while waiting:
        low, high, near = waiting.pop()
        reach = np.array([0, HALO, HALO, HALO])
        near = near[((coords[near] >= low - reach) & (coords[near] < high + reach)).all(1)]
        core = coords[near]
        core = core[((core >= low) & (core < high)).all(1)]
        if not len(core):
            continue
        low, high = core.min(0), core.max(0) + 1  # shrink to the latents: empty space needs no halo
        near = near[((coords[near] >= low - reach) & (coords[near] < high + reach)).all(1)]
        single_sample = high[0] - low[0] == 1
        if len(near) <= limit and single_sample:
            boxes.append((low, high, torch.from_numpy(near).to(voxels.device)))
            continue
        sides = high - low
        if sides.max() == 1:
            return None
        axis = int(sides[1:].argmax()) + 1 if single_sample else 0
        middle = int(np.clip(np.median(core[:, axis]) + (axis > 0), low[axis] + 1, high[axis] - 1))
        first_high, second_low = high.copy(), low.copy()
        first_high[axis] = second_low[axis] = middle
        waiting += [(second_low, high, near), (low, first_high, near)]  # the lower one is next
    return boxes


def transform(vae: SDFVAE, latents: Tensor, voxels: Voxels, position_factor: float, slice_bytes: int) -> Tensor:
    """Run the transformer of the decoder, (L, E) -> (L, C), a few windows at a time."""
    decoder, C = vae.decoder, vae.config.hidden_size
    dtype = decoder.input_layer.weight.dtype
    tokens = max(MIN_SLICE, slice_bytes // (C * (12 * dtype.itemsize + 4)))  # queries, keys, values, feed-forward
    x = latents.new_empty(len(voxels), C, dtype=dtype)
    for first in range(0, len(voxels), tokens):  # not `voxels.position_embedding`, which would stay in memory
        rows = slice(first, first + tokens)
        position = absolute_position_embedding(voxels.coords[rows, 1:].float() * position_factor, C)
        x[rows] = decoder.input_layer(latents[rows].to(dtype)) + position.to(dtype)
    for block in decoder.blocks:
        windows = voxels.windows(block.shift, block.window)
        for rows, part in _window_slices(windows, tokens):
            h = x[rows]
            h = h + block.attention(block.norm1(h), part)
            x[rows] = h + block.feed_forward(block.norm2(h))
    return x


def _window_slices(windows: Windows, tokens: int) -> Iterator[tuple[slice | Tensor, Windows]]:
    """Yield groups of whole windows with about `tokens` tokens: their rows, and the windows over these rows."""
    ends = np.concatenate([[0], np.cumsum(windows.lengths)])
    first = 0
    while first < len(windows.lengths):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + tokens, side="right")) - 1)
        begin, end = int(ends[first]), int(ends[last])
        cu_seqlens = windows.cu_seqlens[first : last + 1] - windows.cu_seqlens[first]
        rows = slice(begin, end) if windows.order is None else windows.order[begin:end]
        yield rows, Windows(None, cu_seqlens, windows.lengths[first:last])
        first = last


class _Table:
    """The neighbours of all latents, to look up those of a chunk."""

    def __init__(self, voxels: Voxels):
        self.neighbors = voxels.neighbors
        self.local = torch.empty(len(voxels) + 1, dtype=torch.int32, device=voxels.device)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return the neighbours (27, N) of `rows` (N,) among these rows, N where there is none."""
        N = len(rows)
        self.local.fill_(N)
        self.local[rows] = torch.arange(N, dtype=torch.int32, device=rows.device)
        return self.local[self.neighbors[:, rows].long()]


def _decode_box(vae, weights, features, table, voxels, low, high, rows, place, results, slice_bytes) -> int:
    """Write the rows of the results (512 L, ...) that belong to the latents in a box; return their number."""
    low, high = (torch.from_numpy(corner[1:]).to(rows.device) for corner in (low, high))
    blocks, x, neighbors = vae.decoder.up_blocks, features[rows], table.of_rows(rows)
    cells = voxels.coords[rows, 1:]  # (N, 3) at this level
    origin = rows  # the latent of each cell
    for level in range(2):
        x = F.silu(gather_conv(x, neighbors, weights[2 * level], blocks[level].conv1.bias), inplace=True)
        scale, margin = 2 << level, MARGINS[level + 1]
        children = _children(cells)  # (8 N, 3)
        needed = ((children >= scale * low - margin) & (children < scale * high + margin)).all(1).nonzero()[:, 0]
        out = gather_conv(x, neighbors, weights[2 * level + 1], blocks[level].conv2.bias)
        x = F.silu(out[needed], inplace=True)
        del out
        neighbors = _child_neighbors(neighbors, needed)
        cells, origin = children[needed], origin[needed // 8]
    x = F.silu(gather_conv(x, neighbors, weights[4], blocks[2].conv1.bias), inplace=True)  # (N, C / 16) at R/2

    core = ((cells >= 4 * low) & (cells < 4 * high)).all(1).nonzero()[:, 0]
    corner = 2 * (cells[core] % 4).long()  # of its 2³ voxels, in their block
    base = place[origin[core]] * FACTOR**3 + (corner * corner.new_tensor([FACTOR**2, FACTOR, 1])).sum(1)
    child = torch.arange(8, device=rows.device)
    offset = (child // 4 * FACTOR + child // 2 % 2) * FACTOR + child % 2
    size = max(MIN_SLICE, slice_bytes // (8 * (3 * x.shape[1] * x.element_size() + 40)))
    for some, to in zip(core.split(size), base.split(size), strict=True):
        h = F.silu(gather_conv(x, neighbors[:, some], weights[5], blocks[2].conv2.bias), inplace=True)
        sdf, to = vae.decoder.out_layer(h)[:, 0].float().tanh_(), (to[:, None] + offset).view(-1)  # (8 P,)
        for result, part in zip(results, (sdf, h), strict=True):
            if result is not None:
                result[to] = part
    return len(core) // CELLS


def _children(cells: Tensor) -> Tensor:
    """Return the coordinates (8 N, 3) of the children of cells (N, 3), in rows 8 n + child."""
    child = torch.arange(8, dtype=cells.dtype, device=cells.device)
    offset = torch.stack([child // 4, child // 2 % 2, child % 2], dim=1)
    return (2 * cells[:, None] + offset).flatten(0, 1)


def _child_neighbors(neighbors: Tensor, needed: Tensor) -> Tensor:
    """Return the neighbours (27, P) among the children in rows `needed` (P,) of 8 n + child.

    They follow from the neighbours of the parents (27, N) as in `child_neighbors`, but one offset at a time, so that
    the memory stays within the budget.
    """
    N, P = neighbors.shape[1], len(needed)
    rank = torch.full((8 * N + 8,), P, dtype=torch.int32, device=needed.device)
    rank[needed] = torch.arange(P, dtype=torch.int32, device=needed.device)
    parent, child = needed // 8, needed % 8
    tables = (device_constant(table, needed.device, torch.long) for table in (CELL_OFFSET, CHILD))
    coarse_offset, neighbor_child = tables  # (27, 8) each
    table = torch.empty(27, P, dtype=torch.int32, device=needed.device)
    for k in range(27):
        row = neighbors[coarse_offset[k][child], parent].long()
        table[k] = rank[row * 8 + neighbor_child[k][child]]
    return table


def _lexicographic(voxels: Voxels) -> tuple[Tensor, Tensor]:
    """Return coords (L, 4) sorted by sample, x, y, z, and `order` (L,), which gives them as `voxels.coords[order]`."""
    batch, x, y, z = voxels.coords.long().unbind(1)
    R = voxels.resolution
    order = (((batch * R + x) * R + y) * R + z).argsort()
    return voxels.coords[order], order

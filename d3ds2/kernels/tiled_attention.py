"""Attention of many short segments as a few padded products, on any device that torch knows.

A segment is a list of queries and a run of keys; all queries of a segment attend to all its keys. The queries are cut
into tiles. Tiles with about as many keys form a group, padded to the longest of them, and a group is one call.

Sizes named in this file:
    S  segments      n  tiles of a group      R  queries of a tile, padded      L  keys of a tile, padded
    P  queries of all segments                G  heads that share a key         D  channels per head

A row of queries holds the G heads that share a key, (G D); a row of keys or values is one head, (D).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .devices import memory_efficient_takes

KEYS_MULTIPLE = 16  # numbers in a register: rows of scores that end within one take half as long again on a CPU
TILE_ROWS = 1024  # queries times heads of a tile: with fewer, the products are inefficient on a CPU
MIN_GROUP_KEYS = 16  # shorter tiles share a group
GROUPS_PER_DOUBLING = 2  # of the number of keys: more save padding, and cost calls


@dataclass(frozen=True, eq=False)
class Segments:
    """S lists of queries, one after the other, and the keys of each.

    Args:
        rows: the row in q of each query of the lists, (P,) long.
        lengths: queries in each list, (S,) long, on the host.
        first_key: the row in k and v of the first key of each segment, (S,) long, on the host.
        num_keys: keys of each segment, (S,) long, on the host; none only where there are no queries either.
        key_stride: rows from a key to the next.
    """

    rows: Tensor
    lengths: Tensor
    first_key: Tensor
    num_keys: Tensor
    key_stride: int


@dataclass(frozen=True, eq=False)
class TileGroup:
    """n tiles of R queries and L keys, padded where a tile has fewer.

    Args:
        queries: rows in q, (n, R) long; a padded place repeats the tile's last query.
        keys: rows in k and v, (n, L) long; a padded place repeats the last key.
        real_queries: False where a query is padding, (n, R); None if none is.
        real_keys: the same of keys, (n, L); None if none is.
    """

    queries: Tensor
    keys: Tensor
    real_queries: Tensor | None
    real_keys: Tensor | None


def cut_into_tiles(
    segments: Segments, row_size: int, head_dim: int, element_size: int, chunk_bytes: int, max_rows: int = TILE_ROWS
) -> tuple[list[TileGroup], Tensor]:
    """Cut segments into groups of tiles.

    Args:
        segments: the queries and their keys.
        row_size, head_dim: numbers in a row of queries, G D, and in one of keys, D.
        element_size: bytes of a number.
        chunk_bytes: what the copies and scores of a group may take, unless one tile takes more.
        max_rows: queries times G of a tile at most.

    Returns:
        The groups, and the slot of each query of the lists, (P,) long: its place among all queries of all groups.
    """
    G = row_size // head_dim
    max_queries = max(1, max_rows // G)
    device, lengths = segments.rows.device, segments.lengths
    tiles = (lengths + (max_queries - 1)) // max_queries  # of each segment
    segment = torch.repeat_interleave(tiles)
    number = torch.arange(len(segment)) - (tiles.cumsum(0) - tiles)[segment]
    even = (lengths + tiles - 1).div(tiles.clamp(min=1), rounding_mode="floor")[segment]
    start = number * even  # the first tiles of a segment are full, the last one has what is left
    count = torch.minimum(even, lengths[segment] - start).clamp_(min=0)
    start += (lengths.cumsum(0) - lengths)[segment]
    first_key, num_keys = segments.first_key[segment], segments.num_keys[segment]

    size = num_keys.clamp(min=MIN_GROUP_KEYS).double().log2().mul(GROUPS_PER_DOUBLING).ceil()
    order = size.argsort(stable=True)
    slot = torch.empty_like(start)  # of each tile's first query
    groups, num_slots, first = [], 0, 0
    for group_tiles in size[order].unique_consecutive(return_counts=True)[1].tolist():
        members = order[first : first + group_tiles]
        first += group_tiles
        R, L = int(count[members].max()), int(num_keys[members].max())
        L += -L % KEYS_MULTIPLE
        tile_bytes = element_size * (3 * R * row_size + 2 * L * head_dim + R * G * L)
        for chunk in members.split(max(1, chunk_bytes // tile_bytes)):
            slot[chunk] = num_slots + R * torch.arange(len(chunk))
            full = bool((count[chunk] == R).all()), bool((num_keys[chunk] == L).all())
            begin, queries, key, keys = (x[chunk].to(device) for x in (start, count, first_key, num_keys))
            groups.append(_group(segments, begin, queries, key, keys, R, L, *full))
            num_slots += R * len(chunk)

    shift = torch.repeat_interleave((slot - start).to(device), count.to(device), output_size=len(segments.rows))
    return groups, shift.add_(torch.arange(len(shift), device=device))


def _group(
    segments: Segments, start: Tensor, count: Tensor, first_key: Tensor, num_keys: Tensor, R: int, L: int,
    full_queries: bool, full_keys: bool,
) -> TileGroup:  # fmt: skip
    """A group of the tiles with `count` queries from place `start` in the lists, (n,) each, and their keys."""
    real_queries, queries = _padded(count, R)
    real_keys, keys = _padded(num_keys, L)
    return TileGroup(
        queries=segments.rows[start[:, None] + queries],
        keys=first_key[:, None] + segments.key_stride * keys,
        real_queries=None if full_queries else real_queries,
        real_keys=None if full_keys else real_keys,
    )


def _padded(lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Whether each of `size` places is below the length, and 0, 1, …, length - 1, length - 1, …: (n, size) each."""
    places = torch.arange(size, device=lengths.device)
    return places < lengths[:, None], torch.minimum(places, (lengths - 1)[:, None])


def tiles_forward(q: Tensor, k: Tensor, v: Tensor, groups: list[TileGroup], scale: float) -> tuple[Tensor, Tensor]:
    """Attend within each tile: q (Nq, G D), k and v (Nk, D) -> out (slots, G D) and lse (slots, G), at least float32.

    What stands in the slots of padded queries means nothing.
    """
    both, G = torch.cat([k, v], dim=1), q.shape[1] // k.shape[1]
    results = [_attend(*_operands(group, q, both), scale) for group in groups]
    out, lse = zip(*results, strict=True)
    return torch.cat([x.reshape(-1, q.shape[1]) for x in out]), torch.cat([x.reshape(-1, G) for x in lse])


def tiles_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: list[TileGroup],
    scale: float,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Return the gradients of the queries by slot, (slots, G D), and add those of k and v to dk and dv (Nk, D).

    dout, q and out are (Nq, G D), lse is (Nq, G). A query may stand in several tiles; out and lse are then those over
    the keys of all of them.
    """
    dq, both = [], torch.cat([k, v], dim=1)
    for group in groups:
        queries, keys, values, bias = _operands(group, q, both)
        rows = group.queries.flatten()
        tile_dout, tile_out = (x.index_select(0, rows).view(queries.shape) for x in (dout, out))
        tile_lse = lse.index_select(0, rows).view(*group.queries.shape, -1)
        if group.real_queries is not None:
            tile_lse.masked_fill_(~group.real_queries[..., None], math.inf)  # all their probabilities are zero
        tile_lse = tile_lse.view(queries.shape[:3])
        tile_dq, *gradients = _gradients(tile_dout, queries, keys, values, tile_out, tile_lse, bias, scale)
        dq.append(tile_dq.reshape(-1, q.shape[1]))
        for total, gradient in zip((dk, dv), gradients, strict=True):
            total.index_add_(0, group.keys.flatten(), gradient.reshape(-1, k.shape[1]))
    return torch.cat(dq)


def _operands(group: TileGroup, q: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries (n, 1, R G, D), keys and values (n, 1, L, D), and what is added to their scores, (n, 1, 1, L) or None.

    q is (Nq, G D), and keys and values stand side by side, (Nk, 2 D).
    """
    (n, L), D = group.keys.shape, keys_values.shape[1] // 2
    queries = q.index_select(0, group.queries.flatten()).view(n, 1, -1, D)
    keys, values = keys_values.index_select(0, group.keys.flatten()).view(n, 1, L, 2 * D).split(D, dim=3)
    if group.real_keys is None:
        return queries, keys, values, None
    return queries, keys, values, q.new_zeros(n, 1, 1, L).masked_fill_(~group.real_keys[:, None, None], -math.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale + bias) v and the logsumexp: q (n, 1, R G, D) -> the same shape, and (n, 1, R G)."""
    if attends_on_cpu(q):
        bias = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    if memory_efficient_takes(q):
        bias = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
        arguments = q, k, v, bias, True, 0.0, False
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[:2]
        return out, lse[..., : q.shape[2]]  # it comes in whole groups of rows
    scores = _scores(q, k, bias, scale)
    lse = scores.logsumexp(-1)
    return torch.matmul(scores.sub_(lse[..., None]).exp_(), v), lse


def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of `_attend`; out and lse may be those over more keys."""
    if attends_on_cpu(q):
        bias = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    weights = _scores(q, k, bias, scale).sub_(lse[..., None]).exp_()
    dv = torch.matmul(weights.transpose(2, 3), dout)
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = torch.matmul(dout, v.transpose(2, 3)).sub_(delta).mul_(weights).mul_(scale)
    return torch.matmul(dscores, k), torch.matmul(dscores.transpose(2, 3), q), dv


def rows_by_head(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Turn queries (Tq, H, D) into rows (Tq Hk, G D), and keys and values (Tk, Hk, D) into rows (Tk Hk, D)."""
    (Tk, Hk, D), Tq = k.shape, len(q)
    return (
        q.to(dtype).reshape(Tq * Hk, q.shape[1] // Hk * D),
        k.to(dtype).reshape(Tk * Hk, D),
        v.to(dtype).reshape(Tk * Hk, D),
    )


def forward_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of queries, keys and values (..., D) in `tiles_forward`; `tiles_backward` takes float32."""
    return q.dtype if memory_efficient_takes(q) else torch.promote_types(q.dtype, torch.float32)


def attends_on_cpu(q: Tensor) -> bool:
    """Whether torch's attention for the CPU takes queries (n, 1, R G, D); as the products below, it returns the lse."""
    return q.device.type == "cpu"


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """q kᵀ scale + bias, (n, 1, R G, L)."""
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(scale)
    return scores if bias is None else scores.add_(bias)

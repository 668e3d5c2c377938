"""Triton kernels of selection attention; shapes and definition are in selection_attention.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .selection_attention import queries_by_block

LOG2_E = 1.4426950408889634
BLOCK_T = 64  # tokens of a block at a time
QUERY_ROWS = 64  # rows of queries times heads at a time, where a kernel takes several queries


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # fp32 inputs are not rounded to TF32


@triton.jit
def _forward_kernel(
    q, k, v, block_offsets, block_indices, out, lse, scale_log2,
    S, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: one query token and the G query heads that share key/value head h."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_g, offs_d = tl.arange(0, G), tl.arange(0, D)
    q_rows = (t * H + h) * G + offs_g
    b_q = tl.load(q + q_rows[:, None] * D + offs_d)  # [G, D]

    m = tl.full([G], float("-inf"), dtype=tl.float32)
    denom = tl.zeros([G], dtype=tl.float32)
    acc = tl.zeros([G, D], dtype=tl.float32)
    for s in range(S):
        block = tl.load(block_indices + (t * H + h) * S + s)
        if block >= 0:
            start, end = tl.load(block_offsets + block), tl.load(block_offsets + block + 1)
            for first in range(start, end, BLOCK_T):
                offs_t = first + tl.arange(0, BLOCK_T).to(tl.int64)
                valid = offs_t < end
                kv = (offs_t[:, None] * H + h) * D + offs_d
                b_k = tl.load(k + kv, mask=valid[:, None], other=0.0)  # [BLOCK_T, D]
                b_v = tl.load(v + kv, mask=valid[:, None], other=0.0)
                b_s = tl.where(valid, _dot(b_q, tl.trans(b_k)) * scale_log2, float("-inf"))  # [G, BLOCK_T]
                m_new = tl.maximum(m, tl.max(b_s, 1))
                b_p = tl.exp2(b_s - m_new[:, None])
                decay = tl.exp2(m - m_new)
                denom = denom * decay + tl.sum(b_p, 1)
                acc = acc * decay[:, None] + _dot(b_p.to(b_v.dtype), b_v)
                m = m_new

    # a query without any block has denom == 0: return zeros, and an lse of +inf makes its gradients zero
    has_keys = denom > 0
    tl.store(out + q_rows[:, None] * D + offs_d, acc / tl.where(has_keys, denom, 1.0)[:, None])
    tl.store(lse + q_rows, tl.where(has_keys, m + tl.log2(denom), float("inf")))


@triton.jit
def _backward_dq_kernel(
    q, k, v, block_offsets, block_indices, lse, delta, dout, dq, scale, scale_log2,
    S, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: dq of one query token and key/value head, in the order of the forward kernel."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_g, offs_d = tl.arange(0, G), tl.arange(0, D)
    q_rows = (t * H + h) * G + offs_g
    b_q = tl.load(q + q_rows[:, None] * D + offs_d)  # [G, D]
    b_do = tl.load(dout + q_rows[:, None] * D + offs_d)
    b_lse, b_delta = tl.load(lse + q_rows), tl.load(delta + q_rows)  # [G]

    acc = tl.zeros([G, D], dtype=tl.float32)
    for s in range(S):
        block = tl.load(block_indices + (t * H + h) * S + s)
        if block >= 0:
            start, end = tl.load(block_offsets + block), tl.load(block_offsets + block + 1)
            for first in range(start, end, BLOCK_T):
                offs_t = first + tl.arange(0, BLOCK_T).to(tl.int64)
                valid = offs_t < end
                kv = (offs_t[:, None] * H + h) * D + offs_d
                b_k = tl.load(k + kv, mask=valid[:, None], other=0.0)  # [BLOCK_T, D]
                b_v = tl.load(v + kv, mask=valid[:, None], other=0.0)
                b_p = tl.exp2(_dot(b_q, tl.trans(b_k)) * scale_log2 - b_lse[:, None])  # [G, BLOCK_T]
                b_ds = b_p * (_dot(b_do, tl.trans(b_v)) - b_delta[:, None])
                acc += _dot(tl.where(valid, b_ds, 0.0).to(b_k.dtype), b_k)
    tl.store(dq + q_rows[:, None] * D + offs_d, acc * scale)


@triton.jit
def _backward_dkdv_kernel(
    q, k, v, block_offsets, tile_offsets, tile_blocks, query_offsets, query_ids, lse, delta, dout, dk, dv,
    scale, scale_log2, M, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program: dk, dv of BLOCK_T tokens of one block and head, over the queries which selected that block.

    It takes BLOCK_Q queries at a time, each with its G heads.
    """
    tile, h = tl.program_id(0), tl.program_id(1)
    block = tl.load(tile_blocks + tile)
    if block < M:
        offs_qg, offs_d = tl.arange(0, BLOCK_Q * G), tl.arange(0, D)
        end = tl.load(block_offsets + block + 1)
        first = tl.load(block_offsets + block) + (tile - tl.load(tile_offsets + block)) * BLOCK_T
        first_query, last_query = tl.load(query_offsets + h * M + block), tl.load(query_offsets + h * M + block + 1)
        offs_t = first + tl.arange(0, BLOCK_T).to(tl.int64)
        valid = offs_t < end
        kv = (offs_t[:, None] * H + h) * D + offs_d
        b_k = tl.load(k + kv, mask=valid[:, None], other=0.0)  # [BLOCK_T, D]
        b_v = tl.load(v + kv, mask=valid[:, None], other=0.0)
        b_dk = tl.zeros([BLOCK_T, D], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_T, D], dtype=tl.float32)
        for i in range(first_query, last_query, BLOCK_Q):
            offs_q = i + offs_qg // G
            real = offs_q < last_query
            t = tl.load(query_ids + offs_q, mask=real, other=0).to(tl.int64)  # [BLOCK_Q * G]
            q_rows = (t * H + h) * G + offs_qg % G
            b_q = tl.load(q + q_rows[:, None] * D + offs_d)  # [BLOCK_Q * G, D]
            b_do = tl.load(dout + q_rows[:, None] * D + offs_d)
            b_lse = tl.where(real, tl.load(lse + q_rows), float("inf"))  # no query: its weights are zero
            b_delta = tl.load(delta + q_rows)  # [BLOCK_Q * G]
            b_p = tl.exp2(_dot(b_k, tl.trans(b_q)) * scale_log2 - b_lse)  # [BLOCK_T, BLOCK_Q * G]
            b_ds = b_p * (_dot(b_v, tl.trans(b_do)) - b_delta)
            b_dv += _dot(b_p.to(b_do.dtype), b_do)
            b_dk += _dot(b_ds.to(b_q.dtype), b_q)
        tl.store(dk + kv, b_dk * scale, mask=valid[:, None])
        tl.store(dv + kv, b_dv, mask=valid[:, None])


def _tiles(block_offsets: torch.Tensor, num_tokens: int, tile_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut every block into tiles of at most `tile_size` tokens, without asking the device how many there are.

    Returns the first tile of each block (M + 1,) and the block of each tile, both int32; the number of tiles is an
    upper bound, and those beyond the last have block M.
    """
    M = block_offsets.numel() - 1
    tiles = (block_offsets.diff() + tile_size - 1) // tile_size
    tile_offsets = torch.nn.functional.pad(tiles.cumsum(0), (1, 0)).int()
    numbers = torch.arange(num_tokens // tile_size + M, dtype=torch.int32, device=block_offsets.device)
    return tile_offsets, torch.searchsorted(tile_offsets[1:], numbers, right=True, out_int32=True)


class _SelectionAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_offsets, block_indices, scale):
        (T, H, D), G, S = k.shape, q.shape[1] // k.shape[1], block_indices.shape[2]
        out = torch.empty_like(q)
        lse = torch.empty(T, H * G, dtype=torch.float32, device=q.device)
        _forward_kernel[(T, H)](
            q, k, v, block_offsets, block_indices, out, lse, scale * LOG2_E, S, H=H, G=G, D=D, BLOCK_T=BLOCK_T
        )
        ctx.save_for_backward(q, k, v, block_offsets, block_indices, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, block_offsets, block_indices, out, lse = ctx.saved_tensors
        (T, H, D), G, S, M = k.shape, q.shape[1] // k.shape[1], block_indices.shape[2], block_offsets.numel() - 1
        dout = dout.contiguous()
        delta = (out.float() * dout.float()).sum(-1)  # (T, H * G)
        query_offsets, query_ids = queries_by_block(block_indices, M)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tile_offsets, tile_blocks = _tiles(block_offsets, T, BLOCK_T)
        sizes = {"H": H, "G": G, "D": D, "BLOCK_T": BLOCK_T}
        scales = ctx.scale, ctx.scale * LOG2_E
        _backward_dq_kernel[(T, H)](q, k, v, block_offsets, block_indices, lse, delta, dout, dq, *scales, S, **sizes)
        _backward_dkdv_kernel[(len(tile_blocks), H)](
            q, k, v, block_offsets, tile_offsets, tile_blocks, query_offsets, query_ids, lse, delta, dout, dk, dv,
            *scales, M, **sizes, BLOCK_Q=max(1, QUERY_ROWS // G),
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def selection_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, block_offsets: Tensor, block_indices: Tensor, scale: float
) -> Tensor:
    """Same contract as `selection_attention_reference`, in memory linear in T. Differentiable in q, k and v.

    The kernels want powers of two, at least 16, for G and D; others are padded with zeros.
    """
    (T, H, D), G = k.shape, q.shape[1] // k.shape[1]
    if T == 0:
        return torch.zeros_like(q)
    pad_d, pad_g = (max(16, triton.next_power_of_2(size)) - size for size in (D, G))
    if pad_d or pad_g:
        q = torch.nn.functional.pad(q.unflatten(1, (H, G)), (0, pad_d, 0, pad_g)).flatten(1, 2)
        k, v = (torch.nn.functional.pad(x, (0, pad_d)) for x in (k, v))
    out = _SelectionAttention.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), block_offsets, block_indices.contiguous(), scale
    )
    return out.unflatten(1, (H, G + pad_g))[:, :, :G, :D].flatten(1, 2) if pad_d or pad_g else out

"""Time spatial sparse attention beside FlashAttention-2, cuDNN and FlexAttention, in one run on one GPU.

    python benchmarks/attention.py --parity ../shared/parity

Queries (N, 32, 32), keys and values (N, 2, 32) are standard normal in bfloat16. So neighbours choose different blocks,
which is the worst case. SSA is timed from q, k, v and the gates to the gated sum, with the compression of keys and
values. Its rivals are timed from q, k, v (repeated to 32 heads beforehand) to the output. The results are printed as
tables, and written to benchmarks/results/attention-*.md with a plot.
"""

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.structures import ragged_batch, real_voxels, surface_voxels  # noqa: E402
from d3ds2.geometry.attention_plan import attention_plan  # noqa: E402
from d3ds2.geometry.voxels import Voxels  # noqa: E402
from d3ds2.kernels.attention_tiles import AttentionTiles  # noqa: E402
from d3ds2.kernels.block_scores_triton import select_blocks_triton  # noqa: E402
from d3ds2.kernels.packed_attention import _varlen  # noqa: E402
from d3ds2.kernels.packed_attention_triton import packed_attention_triton  # noqa: E402
from d3ds2.kernels.pair_order_triton import pairs_by_block_triton  # noqa: E402
from d3ds2.kernels.ragged import AttentionSegments  # noqa: E402
from d3ds2.kernels.ragged_attention_triton import (  # noqa: E402
    ragged_attention_dkdv,
    ragged_attention_dq,
    ragged_attention_forward,
)
from d3ds2.kernels.selection_attention_triton import select_backward, select_forward  # noqa: E402
from d3ds2.kernels.spatial_sparse_attention_triton import (  # noqa: E402
    COMPRESSION,
    WINDOW,
    spatial_sparse_attention_triton,
)
from d3ds2.layers.spatial_sparse_attention import SpatialSparseAttention  # noqa: E402

H, HK, D = 32, 2, 32
FORMS = [(8, False, 8), (8, False, 32), (4, True, 8), (4, True, 32)]  # compression block, pooled convolution, top-k
MATRIX_RATE = 790e12  # bf16 operations per second of one H200, measured
EXP_RATE = 132 * 16 * 1.98e9  # exponentials per second: 16 per cycle on each multiprocessor, at the clock measured
BANDWIDTH = 4.3e12  # bytes per second, measured
HEAD_START = 20_000_000  # cycles, about 10 ms, in which the host enqueues work
FLEX_TOKENS = 16000  # with fewer, FlexAttention is not timed: it takes 10 s to compile for each size


@dataclass
class Timing:
    forward: float  # ms
    backward: float
    memory: float  # GiB above the inputs at the peak of both passes

    def __str__(self) -> str:
        return f"{self.forward:.2f} / {self.backward:.2f}"


def median_ms(function: Callable, budget: float = 100.0) -> float:
    """Return the median of as many runs as fit in `budget` ms, 2 to 12, after a warm-up run.

    The device sleeps while the host enqueues the work. So this is device time, as in a replayed CUDA graph.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    while len(times) < 3 or (sum(times[1:]) < budget and len(times) < 13):
        torch.cuda._sleep(HEAD_START)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def timed(function: Callable, inputs: list[Tensor]) -> Timing:
    """Time the forward pass without gradients and the backward pass; measure the peak memory of both together.

    The inputs, of any shape, are the arguments of the function.
    """
    with torch.no_grad():
        forward = median_ms(lambda: function(*inputs))
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function(*inputs)
    weight = torch.randn_like(out)
    backward = median_ms(lambda: torch.autograd.grad(out, inputs, weight, retain_graph=True))
    return Timing(forward, backward, (torch.cuda.max_memory_allocated() - before) / 2**30)


def attempt(rival: Callable, inputs: list[Tensor]) -> Timing | str:
    """Return a timing or, if the rival fails, the name of the error for the table; its message goes to stderr.

    The inputs have any shape.
    """
    try:
        return timed(rival, inputs)
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
        return type(error).__name__


def make_inputs(voxels: Voxels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random q (T, H, D), k and v (T, Hk, D) in bf16, and gates (T, 3), for T voxels."""
    torch.manual_seed(0)
    shapes = (len(voxels), H, D), (len(voxels), HK, D), (len(voxels), HK, D)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return q, k, v, torch.rand(len(voxels), 3, device="cuda")


def flash_attention_2(voxels: Voxels) -> Callable:
    """Return torch's varlen kernel."""
    arguments = voxels.cu_seqlens, voxels.cu_seqlens, voxels.counts, voxels.counts
    return lambda q, k, v: _varlen(q, k, v, *arguments, None)[0]


def dense(voxels: Voxels) -> Callable:
    """Return the same softmax over all keys, computed by the kernels of SSA."""
    return lambda q, k, v: packed_attention_triton(q, k, v, voxels.cu_seqlens, voxels.cu_seqlens, D**-0.5)


def cudnn(voxels: Voxels) -> Callable:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        samples = zip(*[x.split(voxels.counts) for x in (q, k, v)], strict=True)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            outputs = [
                torch.nn.functional.scaled_dot_product_attention(*[x.transpose(0, 1)[None] for x in sample])
                for sample in samples
            ]
        return torch.cat([out[0].transpose(0, 1) for out in outputs])

    return run


def flex_attention_of(voxels: Voxels, top_k: int) -> Callable:
    """Return FlexAttention over as many keys as SSA selects: random tiles with the keys of K blocks.

    FlexAttention chooses whole tiles of 128 keys for whole tiles of 128 queries, so its selection is coarser.
    """
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # after eight compilations, it would fall back to computing all scores at once
    config.donated_buffer = False  # the backward pass is timed several times
    N, M = len(voxels), sum(voxels.block_counts)
    tiles = triton.cdiv(N, 128)
    chosen = max(1, min(tiles, round(top_k * N / M / 128)))
    is_chosen = torch.zeros(tiles, tiles, dtype=torch.bool, device="cuda")
    is_chosen.scatter_(1, torch.rand(tiles, tiles, device="cuda").topk(chosen, dim=1).indices, True)
    mask = create_block_mask(lambda b, h, i, j: is_chosen[i // 128, j // 128], 1, 1, N, N, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(*[x.transpose(0, 1)[None] for x in (q, k, v)], block_mask=mask)
        return out[0].transpose(0, 1)

    return run


def ssa(voxels: Voxels, c: int, pooled_conv: bool, top_k: int) -> tuple[Callable, Callable]:
    """Return SSA from q, k, v and gates, and its compression of keys and values alone."""
    module = SpatialSparseAttention(H * D, H, HK, c, pooled_conv, top_k).to("cuda", torch.bfloat16)
    branches = attention_plan(voxels, c, 8, 0)

    def compress(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return module.compress(k.flatten(1), v.flatten(1), voxels)

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return spatial_sparse_attention_triton(q, k, v, *compress(k, v), gates, branches, top_k, D**-0.5)

    return run, lambda k, v: torch.cat(compress(k, v))


def limit_ms(voxels: Voxels, c: int, top_k: int) -> tuple[float, float]:
    """Return the least possible times of the forward and backward pass, in ms.

    The limit is the exponentials, the matrix products or the memory traffic, whichever takes longest. A score is a pair
    of a query head and a compressed, selected or window key. Forward, every score takes 4 D operations and an
    exponential, and each compressed one 2 D and an exponential more for the block scores. Backward, every score takes
    10 D operations and an exponential.
    """
    compressed = sum(n * m for n, m in zip(voxels.counts, voxels.coarsen(c)[0].counts, strict=True)) * H
    sizes = voxels.block_offsets.diff().double()
    window = sizes.square().sum().item() * H
    selected = (
        sum(min(top_k, m) * n * n / max(1, m) for n, m in zip(voxels.counts, voxels.block_counts, strict=True)) * H
    )
    scores = compressed + selected + window
    forward = max((scores + compressed) / EXP_RATE, (4 * scores + 2 * compressed) * D / MATRIX_RATE)
    backward = max(scores / EXP_RATE, 10 * D * scores / MATRIX_RATE)
    traffic = len(voxels) * H * D * 2 / BANDWIDTH
    return 1e3 * max(forward, 2 * traffic), 1e3 * max(backward, 4 * traffic)


def measure(name: str, voxels: Voxels, rivals: bool) -> list[list[str]]:
    q, k, v, gates = make_inputs(voxels)
    repeated = [q, k.repeat_interleave(H // HK, 1), v.repeat_interleave(H // HK, 1)]
    flash = attempt(flash_attention_2(voxels), repeated)
    rows = [[name, f"{len(voxels):,}", f"{sum(voxels.block_counts):,}", "FlashAttention-2", *cells(flash)]]
    if rivals:
        rows.append([name, "", "", "cuDNN", *cells(attempt(cudnn(voxels), repeated), flash)])
        rows.append([name, "", "", "dense, this project", *cells(attempt(dense(voxels), repeated), flash)])
        if voxels.batch_size == 1 and len(voxels) >= FLEX_TOKENS:
            flex = attempt(flex_attention_of(voxels, 8), repeated)
            rows.append([name, "", "", "FlexAttention, k 8", *cells(flex, flash)])
    del repeated
    for c, pooled_conv, top_k in FORMS:
        run, compress = ssa(voxels, c, pooled_conv, top_k)
        timing, part = timed(run, [q, k, v, gates]), timed(compress, [k, v])
        limits = limit_ms(voxels, c, top_k)
        label = f"SSA m_cmp {c}, k {top_k}"
        rows.append([name, "", "", label, *cells(timing, flash, limits)])
        rows.append([name, "", "", f"&nbsp; its compression, m_cmp {c}", *cells(part)])
    for row in rows:
        print(" | ".join(row), flush=True)
    return rows


@torch.no_grad()
def measure_parts(name: str, voxels: Voxels, c: int, top_k: int) -> list[str]:
    """Time the kernels of SSA one by one: ms forward, and ms backward where there is a backward pass."""
    q, k, v, _ = make_inputs(voxels)
    compressed_k, compressed_v = (x.new_zeros(len(voxels.coarsen(c)[0]), HK, D).normal_() for x in (k, v))
    branches, scale, dout = attention_plan(voxels, c, 8, 0), D**-0.5, torch.randn_like(q)
    cells = [name, f"{c}, {top_k}"]

    def both(forward: Callable, backward: Callable) -> None:
        cells.append(f"{median_ms(forward):.2f} / {median_ms(backward):.2f}")

    def time_ragged(k: Tensor, v: Tensor, segments: AttentionSegments, tiles: AttentionTiles) -> Tensor:
        out, lse = ragged_attention_forward(q, k, v, segments, scale, tiles.forward)
        arguments = segments, torch.stack([lse, (out.float() * dout.float()).sum(-1)], dim=-1), dout, scale
        both(
            lambda: ragged_attention_forward(q, k, v, segments, scale, tiles.forward),
            lambda: (
                ragged_attention_dq(q, k, v, *arguments, tiles.dq),
                ragged_attention_dkdv(q, k, v, *arguments, tiles.dkdv),
            ),
        )
        return lse

    lse = time_ragged(compressed_k, compressed_v, AttentionSegments(branches.samples, branches.compressed), COMPRESSION)
    block_indices = select_blocks_triton(q, compressed_k, lse, branches, top_k, scale)
    cells.append(f"{median_ms(lambda: select_blocks_triton(q, compressed_k, lse, branches, top_k, scale)):.2f}")
    cells.append(f"{median_ms(lambda: pairs_by_block_triton(block_indices, len(branches.blocks))):.2f}")
    out, lse, pairs, _ = select_forward(q, k, v, branches.blocks, block_indices, scale)
    stats = torch.stack([lse, (out.float() * dout.float()).sum(-1)], dim=-1)
    arguments = branches.blocks, block_indices, pairs, stats, dout, scale
    both(
        lambda: select_forward(q, k, v, branches.blocks, block_indices, scale),
        lambda: select_backward(q, k, v, *arguments),
    )
    time_ragged(k, v, AttentionSegments(branches.windows, branches.windows), WINDOW)
    print(" | ".join(cells), flush=True)
    return cells


PARTS = [
    "structure",
    "m_cmp, k",
    "compression",
    "scores and top-k",
    "sorting pairs",
    "selection, with sorting",
    "window",
]


def cells(timing: Timing | str, flash: Timing | str | None = None, limits: tuple | None = None) -> list[str]:
    """Return the cells of a timing: forward, backward, ratios to FlashAttention-2, memory, share of the limit."""
    if isinstance(timing, str):
        return [timing, "", "", "", ""]
    ratios = share = ""
    if isinstance(flash, Timing):
        ratios = f"{flash.forward / timing.forward:.1f} / {flash.backward / timing.backward:.1f}"
    if limits:
        share = f"{limits[0] / timing.forward:.0%} / {limits[1] / timing.backward:.0%}"
    return [f"{timing.forward:.2f}", f"{timing.backward:.2f}", ratios, f"{timing.memory:.2f}", share]


HEADER = ["structure", "tokens", "blocks", "what", "forward ms", "backward ms", "× FlashAttention-2", "GiB", "of limit"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(rows: list[list[str]], path: Path) -> None:
    """Plot ratios to FlashAttention-2 over the number of tokens, as in Fig. 7 of the paper."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, place, title in zip(axes, (0, 1), ("forward", "backward"), strict=True):
        for c, _, top_k in FORMS:
            label = f"SSA m_cmp {c}, k {top_k}"
            points = [(row[0], row[6]) for row in rows if row[3] == label and row[0].startswith("surface") and row[6]]
            tokens = [int(name.split()[1]) / 1024 for name, _ in points]
            axis.plot(tokens, [float(ratio.split(" / ")[place]) for _, ratio in points], marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens, thousands of 1024", title=title)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("times as fast as FlashAttention-2")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parity", type=Path, default=ROOT.parent / "shared" / "parity", help="folder with the real structure"
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 4, 8, 16, 32, 64, 128, 256], help="in 1024 tokens")
    parser.add_argument("--cases", nargs="*", default=["real", "ragged", "surface"], help="cases, by first word")
    parser.add_argument("--rivals", action="store_true", help="also time cuDNN and FlexAttention")
    parser.add_argument("--parts", action="store_true", help="also time each kernel of SSA by itself")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()

    device = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    print(device, versions, flush=True)
    cases = {
        "real 1024³": lambda: real_voxels(arguments.parity, "cuda"),
        "real, coarsened 2×": lambda: real_voxels(arguments.parity, "cuda", 2),
        "ragged batch of 4": lambda: ragged_batch([3000, 9000, 20000, 52820], "cuda"),
    } | {f"surface {n * 1024}": lambda n=n: surface_voxels(n * 1024, "cuda") for n in sorted(arguments.sizes)[::-1]}
    cases = {name: make for name, make in cases.items() if name.startswith(tuple(arguments.cases))}
    stem = "attention-" + device.split()[-1].lower()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows, parts = [], []
    for name, make in cases.items():
        voxels = make()
        rows += measure(name, voxels, arguments.rivals)
        if arguments.parts:
            parts += [measure_parts(name, voxels, c, top_k) for c, top_k in ((8, 8), (4, 8))]
        torch.cuda.empty_cache()
        (arguments.out / f"{stem}-tables.md").write_text(
            f"{datetime.date.today()}, {device}, {versions}.\n\n{table(HEADER, rows)}\n"
            f"\nSingle kernels, ms forward / backward:\n\n{table(PARTS, parts)}\n"
        )
    plot(rows, arguments.out / f"{stem}.png")


if __name__ == "__main__":
    main()

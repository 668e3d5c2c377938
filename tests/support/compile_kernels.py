"""Compile the kernels of the latent DiT for an H100/H200, without a GPU.

    python tests/support/compile_kernels.py [attention]    # all kernels, or those of attention

The interpreter accepts what the compiler rejects. Sizes are those of the latent DiT: 2 x 16 heads of 32 channels.
"""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d3ds2.kernels import block_scores_triton as block_scores
from d3ds2.kernels import compression_triton as compression
from d3ds2.kernels import gather_conv_triton as gather_conv
from d3ds2.kernels import group_norm_triton as group_norm
from d3ds2.kernels import modulation_triton as modulation
from d3ds2.kernels import pair_gradients_triton as pair_gradients
from d3ds2.kernels import pair_order_triton as pair_order
from d3ds2.kernels import ragged_attention_triton as run_attention
from d3ds2.kernels import ragged_triton as cutting
from d3ds2.kernels import selection_attention_triton as selection
from d3ds2.kernels import spatial_sparse_attention_triton as spatial

HOPPER = GPUTarget("cuda", 90, 32)
SIZES = {"H": 2, "G": 16, "D": 32, "GP": 16, "DP": 32}
LISTS = [  # of queries with ids, keys with ids, pairs: samples, shifted windows, selected blocks
    {"HAS_QUERY_IDS": False, "HAS_KEY_IDS": False, "P": 0},
    {"HAS_QUERY_IDS": True, "HAS_KEY_IDS": True, "P": 0},
    {"HAS_QUERY_IDS": True, "HAS_KEY_IDS": False, "P": 8},
]
SCALARS = {"scale": "fp32", "scale_log2": "fp32"} | dict.fromkeys(
    ["S", "M", "SIZE", "ROWS", "HG", "B", "K", "num_tiles", "STRIDE", "LONGEST", "Tk", "CAPACITY"], "i32"
)
FLOATS = {"lse", "stats", "key_norms", "dk", "dv", "partial_dk", "partial_dv", "gates", "partial_lse", "scratch"}
FLOATS |= {"compression_lse", "selection_lse", "window_lse"}
VALUES = {"q", "k", "v", "keys", "out", "dout", "dq", "partial", "compression", "selection", "window", "gated_out"}
VALUES |= {"first", "second"}


NORMED = ["x", "keys", "values", "position", "weight", "bias", "dy", "skip", "dx", "dweight", "dbias", "out"]
NORMED += ["added", "dout", "pooled", "dpooled"]
COMPRESSION = dict.fromkeys(NORMED, "*bf16") | dict.fromkeys(["partial", "statistics", "group_means"], "*fp32")
COMPRESSION |= dict.fromkeys(["place", "parent"], "*i64") | {"eps": "fp32"}
COMPRESSION |= dict.fromkeys(["N", "M", "B", "S", "SIZE", "SLICE"], "i32")


def compile_kernel(kernel, constants: dict, num_warps: int, num_stages: int = 2, types: dict | None = None) -> None:
    """Compile a kernel for HOPPER; `types` are those of arguments which differ from attention's."""
    signature, values, attributes = {}, {}, {}
    types = types or {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name in types:
            signature[name] = types[name]
            if types[name].startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:
            signature[name] = "*fp32" if name in FLOATS else "*bf16" if name in VALUES else "*i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    triton.compile(source(kernel, signature, values, attributes), target=HOPPER, options=options)
    print("compiled", kernel.__name__, constants, flush=True)


def source(kernel, signature: dict, values: dict, attributes: dict) -> ASTSource:
    """Return what `triton.compile` takes; Triton 3.1 names arguments by their positions."""
    if not triton.__version__.startswith("3.1."):
        return ASTSource(kernel, signature, values, attributes)
    from triton.compiler.compiler import AttrsDescriptor

    signature = {kernel.arg_names.index(name): type for name, type in signature.items() if type != "constexpr"}
    values = {position: value for (position,), value in values.items()}
    return ASTSource(kernel, signature, values, AttrsDescriptor({position for (position,) in attributes}))


def of_tile(tile) -> dict:
    return (
        SIZES
        | {"MAX_BOUND": 100.0, "MIN_MEAN_WEIGHT": 2.0**-100, "SHIFT": run_attention.SHIFT}
        | {"BLOCK_Q": tile.rows // 16, "BLOCK_K": tile.keys, "SPLITS": tile.splits}
    )


def main() -> None:
    compile_attention()
    if sys.argv[1:] != ["attention"]:
        compile_compression()
        compile_modulation()


def compile_attention() -> None:
    """Compile the kernels of the three branches."""
    for lists, tiles in zip(LISTS, (spatial.COMPRESSION, spatial.WINDOW, selection_tiles()), strict=True):
        kernels = run_attention._forward_kernel, run_attention._dq_kernel, run_attention._dkdv_kernel
        for kernel, tile in zip(kernels, tiles, strict=True):
            compile_kernel(kernel, named(kernel, of_tile(tile) | lists), tile.warps, tile.stages)
    kernel, tile = pair_gradients._dkdv_chunk_kernel, selection.HALF.dkdv
    compile_kernel(kernel, named(kernel, of_tile(tile) | {"P": 8, "CHUNK": pair_gradients.CHUNK_PAIRS}), tile.warps)
    kernel = pair_gradients._add_chunks_kernel
    compile_kernel(kernel, named(kernel, of_tile(tile)), 4)
    for has_order, tile in ((False, block_scores.HALF), (True, block_scores.HALF_SEVERAL_KEYS)):
        kernel = block_scores._select_kernel
        constants = SIZES | {"KP": 8, "LANES": tile.lanes, "STEPS": tile.bound_steps}
        constants |= {"BLOCK_Q": tile.rows // 16, "BLOCK_B": tile.blocks, "RANKED": tile.ranked}
        compile_kernel(kernel, constants | {"HAS_ORDER": has_order, "INTERLEAVED": True}, tile.warps, tile.stages)
    merging = SIZES | {"BLOCK": selection.MERGED_ROWS, "GATED": True, "KEEP": True, "HAS_OTHERS": True}
    for kernel in (selection._merge_kernel, selection._sum_kernel, spatial._delta_kernel):
        compile_kernel(kernel, named(kernel, merging), 4)
    numbers = dict.fromkeys(["PAIRS", "Hk", "K", "M", "TILES", "LISTS"], "i32")
    order = {"BLOCK": pair_order.TILE.counted, "COMPARED": pair_order.TILE.compared}
    compile_kernel(pair_order._list_kernel, {"BLOCK": pair_order.TILE.listed}, 4, types=numbers)
    compile_kernel(pair_order._count_kernel, order, 4, types=numbers)
    compile_kernel(pair_order._place_kernel, order | {"LP": pair_order.MAX_LISTS}, 4, types=numbers)
    compile_kernel(run_attention._key_norm_kernel, {"D": 32, "DP": 32, "BLOCK": 256, "H": 2}, 4)
    compile_kernel(cutting._tile_offsets_kernel, {"SIZE": 4, "BLOCK": cutting.MAX_SEGMENTS}, 4)
    compile_kernel(cutting._tile_segments_kernel, {"BLOCK": cutting.TILES}, 4)


def compile_compression() -> None:
    """Compile the kernels of compression for two tensors of 64 channels in 32 groups."""
    tiles = {"C": 64, "G": 32, "BLOCK_N": 64, "BLOCK_C": 64}
    merging = {"C": 64, "G": 32, "J": 2, "BLOCK_T": 128, "BLOCK_G": 8, "BLOCK_J": 2}
    for kernel in (group_norm._merge_statistics_kernel, group_norm._merge_sums_kernel):
        compile_kernel(kernel, merging, 4, types=COMPRESSION)
    for flag in (False, True):
        for kernel, kinds in (
            (group_norm._statistics_kernel, {"JOIN": flag}),
            (group_norm._normalize_kernel, {"SILU": flag}),
            (group_norm._gradient_kernel, {"SILU": flag, "POOLED": flag, "SUM": True}),
            (group_norm._gradient_kernel, {"SILU": flag, "POOLED": flag, "SUM": False}),
        ):
            compile_kernel(kernel, named(kernel, tiles) | kinds, 4, types=COMPRESSION)
        for rows, stages in ((16, gather_conv.DEEP_STAGES), (128, gather_conv.STAGES)):
            convolution = {"K": 27, "CIN": 64, "COUT": 64, "CB": 64, "BLOCK_N": rows, "BLOCK_I": 64, "BLOCK_O": 64}
            kinds = {"HAS_BIAS": not flag, "HAS_ADDED": not flag, "TRANSPOSED": flag}
            compile_kernel(gather_conv._conv_kernel, convolution | kinds, 4, stages, types=COMPRESSION)
        kernel, pooling = compression._pool_kernel, tiles | {"HAS_IDS": flag, "NORM": flag}
        compile_kernel(kernel, pooling, 4, types=COMPRESSION | {"skip": "*fp32"})
    kernel = compression._pool_gradient_kernel
    compile_kernel(kernel, named(kernel, tiles), 4, types=COMPRESSION)
    kernel = gather_conv._dweight_kernel
    compile_kernel(kernel, named(kernel, convolution), 4, 3, types=COMPRESSION)
    summing = {"BLOCK_S": gather_conv.BLOCK_S, "BLOCK": gather_conv.SUMMED}
    compile_kernel(gather_conv._sum_slices_kernel, summing, 4, types=COMPRESSION)


def compile_modulation() -> None:
    """Compile in half precision, and in the mixture of training: h and results float32, parameters and x bfloat16."""
    offsets = dict.fromkeys(["offsets", "tile_offsets", "tile_samples"], "*i32")
    offsets |= dict.fromkeys(["N", "B", "STRIDE", "SHIFT_STRIDE", "SCALE_STRIDE"], "i32") | {"partial": "*fp32"}
    parameters = dict.fromkeys(["shift", "scale", "gate", "x", "dx"], "*bf16")
    for tokens in ("*bf16", "*fp32"):
        types = offsets | parameters | dict.fromkeys(["h", "out", "dout", "dh"], tokens)
        for kernel, tile in (
            (modulation._norm_kernel, modulation.NORM),
            (modulation._norm_backward_kernel, modulation.NORM_BACKWARD),
            (modulation._gate_kernel, modulation.GATE),
            (modulation._gate_backward_kernel, modulation.GATE_BACKWARD),
        ):
            constants = {"C": 1024, "CP": 1024, "ROWS": tile.rows, "BLOCK_N": tile.elements // 1024}
            constants |= {"RAGGED": tokens == "*fp32", "EPS": 1e-6, "ONE": 1.0}
            compile_kernel(kernel, named(kernel, constants), tile.warps, types=types)


def selection_tiles() -> tuple:
    return selection.HALF.forward, selection.HALF.dq, selection.HALF.dkdv


def named(kernel, constants: dict) -> dict:
    """Return the constants that the kernel takes."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


if __name__ == "__main__":
    main()

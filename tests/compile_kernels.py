"""Compile the kernels of attention for an H100/H200, without a GPU: python tests/compile_kernels.py

The interpreter accepts what the compiler rejects. Sizes are those of the latent DiT: 2 x 16 heads of 32 channels.
"""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from d3ds2.kernels import block_scores_triton as block_scores
from d3ds2.kernels import pair_gradients_triton as pair_gradients
from d3ds2.kernels import run_attention_triton as run_attention
from d3ds2.kernels import selection_attention_triton as selection
from d3ds2.kernels import spatial_attention_triton as spatial

HOPPER = GPUTarget("cuda", 90, 32)
SIZES = {"H": 2, "G": 16, "D": 32, "GP": 16, "DP": 32}
LISTS = [  # of queries with ids, keys with ids, pairs: samples, shifted windows, selected blocks
    {"HAS_QUERY_IDS": False, "HAS_KEY_IDS": False, "P": 0},
    {"HAS_QUERY_IDS": True, "HAS_KEY_IDS": True, "P": 0},
    {"HAS_QUERY_IDS": True, "HAS_KEY_IDS": False, "P": 8},
]
SCALARS = {"scale": "fp32", "scale_log2": "fp32"} | dict.fromkeys(
    ["S", "M", "SIZE", "ROWS", "HG", "B", "K", "num_tiles", "STRIDE", "LONGEST"], "i32"
)
FLOATS = {"lse", "stats", "key_norms", "dk", "dv", "partial_dk", "partial_dv", "gates", "partial_lse", "scratch"}
FLOATS |= {"compression_lse", "selection_lse", "window_lse"}
VALUES = {"q", "k", "v", "keys", "out", "dout", "dq", "partial", "compression", "selection", "window", "gated_out"}
VALUES |= {"first", "second"}


def compile_kernel(kernel, constants: dict, num_warps: int, num_stages: int = 2) -> None:
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:
            signature[name] = "*fp32" if name in FLOATS else "*bf16" if name in VALUES else "*i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    triton.compile(ASTSource(kernel, signature, values, attributes), target=HOPPER, options=options)
    print("compiled", kernel.__name__, constants, flush=True)


def of_tile(tile) -> dict:
    return (
        SIZES
        | {"LIMIT": 100.0, "FLOOR": 2.0**-100, "SHIFT": run_attention.SHIFT}
        | {"BLOCK_Q": tile.rows // 16, "BLOCK_K": tile.keys, "SPLITS": tile.splits}
    )


def main() -> None:
    for lists, tiles in zip(LISTS, (spatial.COMPRESSION, spatial.WINDOW, selection_tiles()), strict=True):
        kernels = run_attention._forward_kernel, run_attention._dq_kernel, run_attention._dkdv_kernel
        for kernel, tile in zip(kernels, tiles, strict=True):
            compile_kernel(kernel, named(kernel, of_tile(tile) | lists), tile.warps, tile.stages)
    kernel, tile = pair_gradients._dkdv_chunk_kernel, selection.DKDV
    compile_kernel(kernel, named(kernel, of_tile(tile) | {"P": 8, "CHUNK": pair_gradients.CHUNK}), tile.warps)
    kernel = pair_gradients._add_chunks_kernel
    compile_kernel(kernel, named(kernel, of_tile(tile)), 4)
    for has_order, tile in ((False, block_scores.HALF), (True, block_scores.SEVERAL)):
        kernel = block_scores._select_kernel
        constants = SIZES | {"KP": 8, "LANES": block_scores.LANES, "STEPS": block_scores.BOUND_STEPS}
        constants |= {"BLOCK_Q": tile.rows // 16, "BLOCK_B": tile.blocks, "RANKED": tile.ranked}
        compile_kernel(kernel, constants | {"HAS_ORDER": has_order, "INTERLEAVED": True}, tile.warps, tile.stages)
    merging = SIZES | {"BLOCK": selection.MERGED_ROWS, "GATED": True, "KEEP": True, "HAS_OTHERS": True}
    for kernel in (selection._merge_kernel, selection._sum_kernel, spatial._delta_kernel):
        compile_kernel(kernel, named(kernel, merging), 4)


def selection_tiles() -> tuple:
    return selection.FORWARD, selection.DQ, selection.DKDV


def named(kernel, constants: dict) -> dict:
    """Those of the constants that the kernel takes."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


if __name__ == "__main__":
    main()

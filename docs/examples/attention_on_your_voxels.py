"""Spatial sparse attention on voxels of your own, forward and backward.

python docs/examples/attention_on_your_voxels.py [resolution]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run from a clone, nothing installed

import torch

import d3ds2


def sphere(resolution: int) -> torch.Tensor:
    """Coordinates (N, 3) of the voxels that a sphere's surface passes through."""
    grid = torch.cartesian_prod(*[torch.arange(resolution)] * 3)
    distance = (grid + 0.5 - resolution / 2).norm(dim=1) - 0.4 * resolution
    return grid[distance.abs() < 0.87]


def main(resolution: str = "32") -> None:
    torch.manual_seed(0)
    coords = torch.nn.functional.pad(sphere(int(resolution)), (1, 0))  # (N, 4): sample 0, x, y, z
    voxels, order = d3ds2.Voxels.sort(coords, int(resolution))
    x = torch.randn(len(coords), 64)[order].requires_grad_()  # features follow their voxels

    attention = d3ds2.SpatialSparseAttention(
        hidden_size=64, num_heads=32, num_kv_heads=2, compression_block=4, pooled_conv=True, top_k=4
    )
    out = attention(x, voxels)  # (N, 64)
    out.square().mean().backward()
    print(f"{len(voxels):,} voxels: out {tuple(out.shape)}, gradient {x.grad.norm():.3g}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Make structures as the first stage makes them: some blocks are missing, and some have no surface in them.

The latent DiT gets its structure from the structure DiT, whose surfaces are too thick in some places and have holes in
others. A network that has only seen true structures makes crumbs and pits of that. So it is also trained on structures
that were changed:

    surplus    blocks within two blocks of the structure are added where a smooth random field is high, at most as many
               as the structure has. Their latents have `LatentDiTConfig.surplus_value` in every channel, far from any
               that the SDF VAE makes. So the sampled latents say which blocks to leave out.
    missing    blocks are removed where another field is high. The latents of the others stay as they are.

A share of the structures stays as it is. All values are drawn from the generator alone, a row for each sample or token.
None of it comes from the paper. [D: see docs/paper.md]

Sizes: B samples, N tokens of the true structures, M tokens of the changed ones, G latent voxels per edge.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.geometry.voxels import Voxels
from training.losses import DrawRows, draw_all

UNTOUCHED = 0.2  # share of the structures that stay as they are
WITHOUT_MISSING = 0.4  # share of the others that only get surplus blocks
MOST_MISSING = 0.2  # of a structure's blocks; the share is the square of a uniform number times this
SMOOTHNESS = 4  # latent voxels between two random values of a field
GRAIN = 0.4  # standard deviation of the noise that makes a field rough
SECOND_RING = 1.0  # taken off the field two blocks away from the structure


class ImperfectStructures(NamedTuple):
    """Changed structures, and what each token was."""

    voxels: Voxels  # M tokens
    rows: Tensor  # (M,) int64: the token of the true structure; that of another row of the sample if surplus
    is_surplus: Tensor  # (M,) bool


def make_imperfect(
    voxels: Voxels, generator: torch.Generator, draw_samples: DrawRows = draw_all
) -> ImperfectStructures:
    """Add blocks to the structures of a batch, and remove some.

    No two surplus tokens have the same row, so rows can also give each of them its own random numbers.

    Args:
        voxels: the true structures, N tokens; no sample is empty.
        draw_samples: that of a part of a batch, see `training.data.parts`.
    """
    B, G, device = voxels.batch_size, voxels.resolution, voxels.device

    def draw(make, *shape: int) -> Tensor:
        rows = draw_samples(B, lambda B: make((B, *shape), generator=generator, device=generator.device))
        return rows.to(device)

    numbers = draw(torch.rand, 4)
    coarse = -(-G // SMOOTHNESS)
    smooth = F.interpolate(draw(torch.randn, 2, coarse, coarse, coarse), size=(G,) * 3, mode="trilinear")
    surplus_field, missing_field = (smooth + GRAIN * draw(torch.randn, 2, G, G, G)).unbind(1)  # (B, G, G, G) each

    row_of = torch.full((B, G, G, G), -1, dtype=torch.int64, device=device)
    row_of[tuple(voxels.coords.long().t())] = torch.arange(len(voxels), device=device)
    occupied = row_of >= 0
    counts = voxels.cu_seqlens.diff().long()  # (B,)
    touched = numbers[:, 0] >= UNTOUCHED
    loses = touched & (numbers[:, 1] >= WITHOUT_MISSING)
    number_surplus = torch.where(touched, (numbers[:, 2] * counts).long(), 0)
    number_missing = torch.where(loses, (MOST_MISSING * numbers[:, 3] ** 2 * counts).long(), 0)

    first, second = _widened(occupied), _widened(_widened(occupied))
    ring = torch.where(first, 0.0, SECOND_RING)
    surplus = _highest(surplus_field - ring, second & ~occupied, number_surplus)
    missing = _highest(missing_field, occupied, number_missing)

    places = ((occupied & ~missing) | surplus).nonzero()  # (M, 4)
    changed, order = Voxels.sort(places, G, B)
    rows = row_of[tuple(places[order].t())]
    is_surplus = rows < 0
    sample = changed.batch_index[is_surplus]
    rank = torch.arange(len(sample), device=device) - F.pad(surplus.flatten(1).sum(1).cumsum(0), (1, 0))[sample]
    rows[is_surplus] = voxels.cu_seqlens.long()[sample] + rank
    return ImperfectStructures(changed, rows, is_surplus)


def _widened(mask: Tensor) -> Tensor:
    """Add to a mask (B, G, G, G) the neighbours of what is in it, across faces, edges and corners."""
    return F.max_pool3d(mask.float(), 3, 1, 1) > 0


def _highest(field: Tensor, mask: Tensor, number: Tensor) -> Tensor:
    """Mark the `number` (B,) highest values of a field (B, G, G, G) within a mask, or all of it if it has fewer."""
    values = field.masked_fill(~mask, -torch.inf).flatten(1)
    order = values.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(values.shape[1], device=values.device) < number[:, None]
    return torch.zeros_like(mask).flatten(1).scatter(1, order, chosen).view_as(mask) & mask

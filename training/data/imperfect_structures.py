"""Make structures as the first stage makes them: some blocks are missing, and some have no surface in them.

The latent DiT gets its structure from the structure DiT, whose surfaces are too thick in some places and have holes in
others. A network that has only seen true structures makes crumbs and pits of that. So it is also trained on other
structures of the same shapes:

    surplus    blocks in which there is no surface. Their latents have `LatentDiTConfig.surplus_value` in every channel,
               far from any that the SDF VAE makes. So the sampled latents say which blocks to leave out. Or the latents
               are free, and should decode to an SDF without a surface (`SurfaceLossConfig.surplus`).
    missing    blocks of the true structure that are not there. The latents of the others stay as they are.

`random_structures` adds and removes blocks where smooth random fields are high. `predicted_structures` takes what the
structure DiT predicts of the picture in one step, cut at a random threshold. All random numbers are drawn from the
generator alone, a row for each sample. None of it comes from the paper. [D: see docs/paper.md]

Sizes: B samples, N tokens of the true structures, M tokens of the others, G latent voxels per edge, C latent channels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.structure_dit import StructureDiT
from d3ds2.networks.structure_vae import StructureVAE, widened
from training.losses import DrawRows

UNTOUCHED = 0.2  # share of the random structures that stay as they are
WITHOUT_MISSING = 0.4  # share of the others that only get surplus blocks
MOST_SURPLUS = 1.5  # times the blocks of the structure; the share is uniform below it
MOST_MISSING = 0.2  # of a structure's blocks; the share is the square of a uniform number times this
SMOOTHNESS = 4  # latent voxels between two random values of a field
GRAIN = 0.4  # standard deviation of the noise that makes a field rough
SECOND_RING = 1.0  # taken off the field two blocks away from the structure

Draw = Callable[..., Tensor]  # make, row shape -> (B, *shape)


class OtherStructures(NamedTuple):
    """Other structures of the same shapes, and what each token was."""

    voxels: Voxels  # M tokens
    rows: Tensor  # (M,) int64: the token of the true structure; -1 if surplus


def drawer(batch_size: int, generator: torch.Generator, draw_samples: DrawRows, device: torch.device) -> Draw:
    """Return a function that draws (B, *shape) by torch.rand or randn; `draw_samples`: see `training.data.parts`."""

    def draw(make: Callable[..., Tensor], *shape: int) -> Tensor:
        rows = draw_samples(batch_size, lambda B: make((B, *shape), generator=generator, device=generator.device))
        return rows.to(device)

    return draw


def rows_of(voxels: Voxels) -> Tensor:
    """Return the row of each voxel in a dense grid, (B, G, G, G) int64; -1 where there is none."""
    rows = torch.full((voxels.batch_size, *[voxels.resolution] * 3), -1, dtype=torch.int64, device=voxels.device)
    rows[tuple(voxels.coords.long().t())] = torch.arange(len(voxels), device=voxels.device)
    return rows


def random_structures(occupied: Tensor, draw: Draw) -> Tensor:
    """Add blocks to structures (B, G, G, G) bool within two blocks of them, and remove some."""
    G, counts = occupied.shape[-1], occupied.flatten(1).sum(1)
    numbers = draw(torch.rand, 4)
    coarse = -(-G // SMOOTHNESS)
    smooth = F.interpolate(draw(torch.randn, 2, coarse, coarse, coarse), size=(G,) * 3, mode="trilinear")
    surplus_field, missing_field = (smooth + GRAIN * draw(torch.randn, 2, G, G, G)).unbind(1)  # (B, G, G, G) each

    touched = numbers[:, 0] >= UNTOUCHED
    loses = touched & (numbers[:, 1] >= WITHOUT_MISSING)
    number_surplus = torch.where(touched, (MOST_SURPLUS * numbers[:, 2] * counts).long(), 0)
    number_missing = torch.where(loses, (MOST_MISSING * numbers[:, 3] ** 2 * counts).long(), 0)
    first, second = _with_neighbors(occupied), _with_neighbors(_with_neighbors(occupied))
    surplus_field = surplus_field - torch.where(first, 0.0, SECOND_RING)
    surplus = _highest(surplus_field, second & ~occupied, number_surplus)
    return (occupied & ~_highest(missing_field, occupied, number_missing)) | surplus


@torch.no_grad()
def predicted_structures(
    dit: StructureDiT,
    vae: StructureVAE,
    image_tokens: ImageTokens,
    thresholds: tuple[float, float],
    wide: float,
    draw: Draw,
) -> Tensor:
    """Predict the structures of B pictures in one step from noise alone: (B, G, G, G) bool.

    Args:
        image_tokens: all tokens of the pictures.
        thresholds: lowest and highest probability from which a voxel is occupied; its logarithm is uniform.
        wide: share of the structures that get a layer of voxels more.
    """
    config = dit.config
    noise = draw(torch.randn, config.latent_channels, *[config.resolution] * 3)
    velocity = dit(noise, torch.ones(len(noise), device=noise.device), image_tokens)
    logits = vae.decode(vae.denormalize_latents(noise - velocity.float()))[:, :1].float()
    numbers = draw(torch.rand, 2)
    low, high = map(math.log, thresholds)
    lowest = (low + (high - low) * numbers[:, 0]).exp()[:, None, None, None]
    is_wide = numbers[:, 1, None, None, None, None] < wide
    return torch.where(is_wide, widened(logits), logits).sigmoid()[:, 0] >= lowest


def on_structures(voxels: Voxels, occupied: Tensor) -> OtherStructures:
    """Put the tokens of true structures onto others, (B, G, G, G) bool; one with nothing in it stays as it is."""
    rows = rows_of(voxels)
    is_empty = ~occupied.flatten(1).any(1)[:, None, None, None]
    places = torch.where(is_empty, rows >= 0, occupied).nonzero()  # (M, 4)
    other, order = Voxels.sort(places, voxels.resolution, voxels.batch_size)
    return OtherStructures(other, rows[tuple(places[order].t())])


def _with_neighbors(mask: Tensor) -> Tensor:
    """Add to a mask (B, G, G, G) the neighbours of what is in it, across faces, edges and corners."""
    return F.max_pool3d(mask.float(), 3, 1, 1) > 0


def _highest(field: Tensor, mask: Tensor, number: Tensor) -> Tensor:
    """Mark the `number` (B,) highest values of a field (B, G, G, G) within a mask, or all of it if it has fewer."""
    values = field.masked_fill(~mask, -torch.inf).flatten(1)
    order = values.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(values.shape[1], device=values.device) < number[:, None]
    return torch.zeros_like(mask).flatten(1).scatter(1, order, chosen).view_as(mask) & mask

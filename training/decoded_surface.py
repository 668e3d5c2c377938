"""The loss of the SDF that predicted latents decode to, for the latent DiT.

A small error of the latents can be a hole in the surface, and a large one none. So part of the samples are decoded.
On structures with surplus blocks, these can be decoded as well: then the network learns in which blocks the surface is,
and where in them, by one loss. None of it comes from the paper. [D: see docs/paper.md]

Sizes: B samples, M tokens of a batch, C latent channels, G latent voxels per edge.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.sdf_vae import FACTOR, SDFVAE
from training.losses import SurfaceLossConfig, sign_divergence


def side_of_free(occupied: Tensor) -> Tensor:
    """Tell on which side of their shapes the free blocks of structures lie.

    Outside is what can be reached from the border of the grid without crossing an occupied block. Steps across corners
    are allowed: where the band of the SDF is wider than a voxel, free blocks that touch are on the same side.

    Args:
        occupied: (B, G, G, G) bool, the blocks of closed surfaces.

    Returns:
        (B, G, G, G) float32: 1 outside, -1 inside, and 0 where a block is occupied.
    """
    free = F.pad(~occupied, (1,) * 6, value=True).float()[:, None]
    outside = torch.zeros_like(free)
    outside[:, :, 0] = 1
    before = torch.zeros_like(free)
    while not torch.equal(before, outside):
        before = outside
        for _ in range(occupied.shape[-1]):
            outside = F.max_pool3d(outside, 3, 1, 1) * free
    return (2 * outside - free)[:, 0, 1:-1, 1:-1, 1:-1]


def slope_error(error: Tensor) -> Tensor:
    """Average the squared differences of neighbours within blocks, summed over the axes: errors (m, 512) -> scalar."""
    cubes = error.view(-1, FACTOR, FACTOR, FACTOR)
    return sum((cubes.diff(dim=axis).square().mean() for axis in (1, 2, 3)), start=error.new_zeros(()))


class DecodedSurface(NamedTuple):
    """The loss of what the predicted x_0 decodes to, beside that of the true latents."""

    vae: SDFVAE  # frozen
    config: SurfaceLossConfig

    def of(
        self,
        predicted: Tensor,
        x_0: Tensor,
        voxels: Voxels,
        has_surface: Tensor,
        decoded: Tensor,
        occupied: Tensor | None = None,
    ) -> Tensor:
        """Average the loss over all SDF voxels of all tokens; it counts as 0 in tokens that are not decoded.

        Args:
            predicted, x_0: (M, C), normalised latents of the voxels.
            has_surface: (M,) bool; the others are surplus. Without `surplus`, these are not decoded, as the pipeline
                leaves them out. With it, all their voxels should be as far outside or inside as an SDF can tell.
            decoded: (B,) bool, which samples are decoded.
            occupied: (B, G, G, G) bool, the true structures; None if the voxels are these.
        """
        rows = decoded[voxels.batch_index]
        if not self.config.surplus:
            rows = rows & has_surface
        if not rows.any():
            return predicted.sum() * 0.0  # with a gradient
        sdf = self._decode(predicted[rows], _some(voxels, rows))
        with torch.no_grad():
            true = rows & has_surface
            target = self._decode(x_0[true], _some(voxels, true))
            if self.config.surplus and occupied is not None:
                target = self._with_surplus(target, _some(voxels, rows), occupied)
        loss = (sdf - target).abs().mean()
        if self.config.sign:
            loss = loss + self.config.sign * sign_divergence(sdf, target).mean()
        if self.config.slope:
            loss = loss + self.config.slope * slope_error(sdf - target)
        return self.config.weight * loss * (len(sdf) / len(voxels))

    def _decode(self, latents: Tensor, voxels: Voxels) -> Tensor:
        """Decode normalised latents (m, C) to (m, 512), the blocks in lexicographic order."""
        if not len(voxels):
            return latents.new_zeros(0, FACTOR**3, dtype=torch.float32)
        return self.vae.decode(self.vae.denormalize_latents(latents.float()), voxels)[0].view(-1, FACTOR**3)

    @staticmethod
    def _with_surplus(target: Tensor, voxels: Voxels, occupied: Tensor) -> Tensor:
        """Put the SDF of the true blocks, (n, 512), among those of all blocks: (m, 512)."""
        decoded = torch.zeros_like(occupied)
        decoded[tuple(voxels.coords.long().t())] = True
        whole = side_of_free(occupied)[decoded][:, None].repeat(1, FACTOR**3)
        whole[occupied[decoded]] = target
        return whole


def _some(voxels: Voxels, rows: Tensor) -> Voxels:
    return Voxels(voxels.coords[rows], voxels.resolution, voxels.batch_size, check=False)

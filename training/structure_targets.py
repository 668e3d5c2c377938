"""Targets of the structure DiT: the latents of structures, and the structures that they decode to.

Sizes: B samples, n structures (shapes in symmetries), C latent channels, G voxels and g = G/4 latent voxels per edge.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d3ds2.kernels.device_constant import device_constant
from d3ds2.networks.structure_vae import StructureVAE
from training.data.damaged_files import READ_ERRORS
from training.data.datasets import Choice, Structures, ViewBatch
from training.data.held import GIB
from training.data.parts import WHOLE, Part
from training.data.symmetry import transform_grid
from training.losses import StructureLossConfig, draw_noise, structure_loss

ENCODED_AT_ONCE = 64  # shapes
BITS = (128, 64, 32, 16, 8, 4, 2, 1)  # of a byte, in the order of np.packbits


class StructureLatents:
    """Normalised posteriors of the shapes in the symmetries that their views need.

    They are encoded at the start and stay on the device if they fit. Else the VAE encodes the shapes of each step.

    Args:
        with_grids: keep the structures as well.

    Attributes:
        are_held: whether they stay on the device.
        rows: (shapes, 8) int64, the row of each shape in each symmetry; -1 if there is none.
        mean, std: (n, C, g, g, g) fp16.
        bits: (n, G³ / 8) uint8, the structures, eight voxels in a byte.
    """

    @torch.no_grad()
    def __init__(
        self,
        vae: StructureVAE,
        structures: Structures,
        wanted: np.ndarray,
        device: torch.device,
        gib: float,
        with_grids: bool = False,
    ):
        self.vae, self.edge = vae, structures.edge
        C, g = vae.config.latent_channels, self.edge // vae.config.factor
        of_structure = 2 * C * g**3 * torch.half.itemsize + (self.edge**3 // 8 if with_grids else 0)
        self.are_held = int(wanted.sum()) * of_structure <= gib * GIB
        self.rows, posteriors, bits, rows = np.full(wanted.shape, -1), [], [], 0
        for some in _batched(self._readable(structures), ENCODED_AT_ONCE) if self.are_held else ():
            shapes, grids = np.array([shape for shape, _ in some]), np.stack([grid for _, grid in some])
            for symmetry in np.flatnonzero(wanted[shapes].any(0)).tolist():
                chosen = wanted[shapes, symmetry]
                moved = np.ascontiguousarray(transform_grid(grids[chosen], symmetry))
                self.rows[shapes[chosen], symmetry] = rows + np.arange(len(moved))
                rows += len(moved)
                posteriors.append(self.encode(torch.from_numpy(moved[:, None]).to(device)))
                if with_grids:
                    bits.append(torch.from_numpy(np.packbits(moved.reshape(len(moved), -1), axis=1)))
        if posteriors:
            self.mean, self.std = (torch.cat(tensors) for tensors in zip(*posteriors, strict=True))
        if bits:
            self.bits = torch.cat(bits).to(device)
        self.rows = torch.from_numpy(self.rows).to(device)

    @staticmethod
    def _readable(structures: Structures) -> Iterator[tuple[int, np.ndarray]]:
        """Yield every shape whose file can be read, and its grid (G, G, G)."""
        for shape in range(len(structures.names)):
            with contextlib.suppress(*READ_ERRORS):
                yield shape, structures.grid(shape, 0)

    @torch.no_grad()
    def encode(self, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode occupancy (B, 1, G, G, G): the mean and the spread of the posteriors, each (B, C, g, g, g) fp16."""
        mean, logvar = self.vae.encode(grids)
        spread = (0.5 * logvar).exp() * abs(self.vae.config.latents_scale)
        return self.vae.normalize_latents(mean).half(), spread.half()

    def draw(
        self, batch: ViewBatch | Choice, sample_posterior: bool, generator: torch.Generator, part: Part = WHOLE
    ) -> Tensor:
        """Draw x_0 of a batch from the posteriors, or take their means: (B, C, g, g, g) float32."""
        if self.are_held:
            rows = self.rows[batch.shapes, batch.symmetries]
            mean, std = self.mean[rows], self.std[rows]
        else:
            mean, std = self.encode(batch.grids)
        if not sample_posterior:
            return mean.float()
        noise = draw_noise(mean.float(), generator, part.draw_samples)
        return mean.float() + std.float() * noise

    def grids(self, batch: ViewBatch | Choice) -> Tensor:
        """Return the occupancy (B, 1, G, G, G) uint8 of a batch; needs `with_grids`."""
        if not self.are_held:
            return batch.grids
        bits = self.bits[self.rows[batch.shapes, batch.symmetries]]
        voxels = (bits[..., None] & device_constant(BITS, bits.device, torch.uint8)) > 0
        return voxels.to(torch.uint8).reshape(len(bits), 1, *[self.edge] * 3)


def _batched(items: Iterator, number: int) -> Iterator[list]:
    """Yield lists of so many items; the last one may be shorter."""
    while batch := list(itertools.islice(items, number)):
        yield batch


class DecodedLoss(NamedTuple):
    """The loss of the occupancy that predicted latents decode to, where x_t is noise alone.

    There the prediction is the mean of all shapes that the image may show. One evaluation gives it: a structure in one
    step, `SamplingConfig.structure_steps` 1, at guidance 1. Its latents decode to a better structure if their loss is
    that of the structure.

    The mean of latents does not decode to the mean of structures, so probabilities come out too low. If the decoder
    learns as well, it learns to tell what such means say. Then the true latents of the other samples are decoded too,
    so that it does not forget them.

    Attributes:
        x_0: the true latents, (B, C, g, g, g).
        occupancy: the true structures, (B, 1, G, G, G) in {0, 1}.
    """

    vae: StructureVAE
    config: StructureLossConfig
    x_0: Tensor
    occupancy: Tensor
    decoder_learns: bool = False

    def of(self, predicted: Tensor, counts: Tensor) -> Tensor:
        """Sum the losses of the samples that count, (B,) bool, and divide by B: predicted (B, C, g, g, g).

        If the decoder learns, the others count too, with their true latents.
        """
        predicted, occupancy = predicted.float(), self.occupancy
        if self.decoder_learns:
            latents = torch.where(counts[:, None, None, None, None], predicted, self.x_0)
        else:
            latents, occupancy = predicted[counts], occupancy[counts]
        if not len(latents):
            return predicted.sum() * 0  # with a gradient
        logits = self.vae.decode(self.vae.denormalize_latents(latents))
        nothing = torch.zeros(1, device=latents.device)
        terms = structure_loss(logits, occupancy, nothing, nothing, self.config)  # no posterior, so no KL
        return terms["loss"] * (len(latents) / len(counts))

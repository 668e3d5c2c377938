"""The training shape whose picture looks most like the one given. A baseline for the evaluation.

Two ways to compare pictures, both by the cosine between vectors from which the training mean is taken: the image
encoder's patch tokens, averaged over the object, and the bare pixels at 32 x 32 (colours on white, and the mask).

Sizes: n pictures, S pixels per edge, C features.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from d3ds2.images.foreground import preprocess
from d3ds2.networks.image_encoder import ImageEncoder, ImageTokens
from training.data.views import Views

PIXELS = 32
KINDS = ("tokens", "pixels")


class View(NamedTuple):
    """One picture of a shape, and the symmetry that brings the shape to where the picture shows it."""

    shape: int  # index into Views.names
    view: int  # index into Views.files[shape]
    symmetry: int


class Pictures(Dataset):
    """Pictures as at inference, in batches: `pictures[i]` is (at most batch_size, 4, S, S) uint8 of `chosen`."""

    def __init__(self, views: Views, chosen: list[View], batch_size: int):
        self.views, self.chosen, self.batch_size = views, chosen, batch_size

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch_size)

    def __getitem__(self, index: int) -> Tensor:
        batch = self.chosen[index * self.batch_size : (index + 1) * self.batch_size]
        return torch.stack([self._picture(view) for view in batch])

    def _picture(self, view: View) -> Tensor:
        image = Image.open(self.views.files[view.shape][view.view]).convert("RGBA")
        return (preprocess(image, self.views.image_size) * 255).round().byte()


def choose_views(views: Views, number: int, seed: int) -> list[View]:
    """`number` views of each shape (all, if it has fewer), drawn for each shape from (seed, its name)."""
    chosen = []
    for shape, name in enumerate(views.names):
        rng = np.random.default_rng([seed, *name.encode()])
        drawn = sorted(rng.permutation(len(views.files[shape]))[:number].tolist())
        chosen.extend(View(shape, view, views.turns[shape][view]) for view in drawn)
    return chosen


@torch.no_grad()
def describe(encoder: ImageEncoder, images: Tensor) -> dict[str, Tensor]:
    """Pictures (n, 4, S, S) float in [0, 1] -> {"tokens": (n, C), "pixels": (n, 4 * 32 * 32)} float32."""
    pixels = F.interpolate(images.float(), (PIXELS, PIXELS), mode="area").flatten(1)
    dtype = next(encoder.parameters()).dtype
    return {"tokens": mean_patch(encoder(images.to(dtype))), "pixels": pixels}


def mean_patch(tokens: ImageTokens) -> Tensor:
    """The mean over the patches that touch the object, (B, C) float32; 0 where none does. Takes all tokens."""
    B = tokens.batch_size
    is_patch = (tokens.foreground & (tokens.coords[:, 3] == 0)).float().view(B, -1, 1)  # (B, T, 1)
    return (tokens.features.float().view(B, is_patch.shape[1], -1) * is_patch).sum(1) / is_patch.sum(1).clamp(min=1)


class NearestView:
    """Descriptions of the training pictures, as they are and mirrored; the nearest one is found by cosine."""

    def __init__(self, encoder: ImageEncoder, chosen: list[View], batches: Iterable[Tensor]):
        """`batches` of (n, 4, S, S) uint8 on the encoder's device, all pictures of `chosen` in order."""
        self.chosen = [View(c.shape, c.view, c.symmetry + 4 * mirrored) for c in chosen for mirrored in (0, 1)]
        parts = []
        for images in batches:
            images = images.float() / 255
            both = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
            parts.append(describe(encoder, both))
        vectors = {kind: torch.cat([part[kind] for part in parts]) for kind in KINDS}
        if len(vectors["pixels"]) != len(self.chosen):
            raise ValueError(f"expected {len(chosen)} pictures, got {len(vectors['pixels']) // 2}")
        self.means = {kind: v.mean(0) for kind, v in vectors.items()}
        self.vectors = {kind: F.normalize(v - self.means[kind], dim=1) for kind, v in vectors.items()}

    def find(self, encoder: ImageEncoder, images: Tensor) -> dict[str, list[View]]:
        """For pictures (n, 4, S, S) uint8, the most similar training picture of each kind."""
        found = {}
        for kind, vector in describe(encoder, images.float() / 255).items():
            query = F.normalize(vector - self.means[kind], dim=1)
            found[kind] = [self.chosen[i] for i in (query @ self.vectors[kind].T).argmax(1).tolist()]
        return found

"""A baseline for the evaluation: the training shape whose picture is the most similar to the given one.

Pictures are compared by the cosine between two kinds of vectors, less their mean over the training pictures: the image
encoder's patch tokens, averaged over the object; and the plain pixels at 32 x 32 (colours on white, and the mask).

Sizes: n pictures, S pixels per edge, C features.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from d3ds2.networks.image_encoder import ImageEncoder, ImageTokens
from training.data.symmetry import MIRROR
from training.data.views import View

PIXELS = 32
KINDS = ("tokens", "pixels")


@torch.no_grad()
def describe(encoder: ImageEncoder, images: Tensor) -> dict[str, Tensor]:
    """Describe pictures (n, 4, S, S) in [0, 1] by {"tokens": (n, C), "pixels": (n, 4 * 32 * 32)}, float32."""
    pixels = F.interpolate(images.float(), (PIXELS, PIXELS), mode="area").flatten(1)
    dtype = next(encoder.parameters()).dtype
    return {"tokens": mean_patch(encoder(images.to(dtype))), "pixels": pixels}


def mean_patch(tokens: ImageTokens) -> Tensor:
    """Average all the patches that touch the object: (B, C) float32, 0 where none does."""
    B = tokens.batch_size
    is_patch = (tokens.foreground & (tokens.coords[:, 3] == 0)).float().view(B, -1, 1)  # (B, T, 1)
    return (tokens.features.float().view(B, is_patch.shape[1], -1) * is_patch).sum(1) / is_patch.sum(1).clamp(min=1)


class NearestView:
    """The training pictures, plain and mirrored, among which the most similar one is found.

    Raises:
        ValueError: there are more or fewer pictures than chosen views.
    """

    def __init__(self, encoder: ImageEncoder, chosen: list[View], batches: Iterable[Tensor]):
        """Describe the pictures of `chosen`, in order in `batches` (n, 4, S, S) uint8 on the encoder's device."""
        self.chosen = [View(c.shape, c.view, c.symmetry + MIRROR * mirrored) for c in chosen for mirrored in (0, 1)]
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
        """Find the training picture most similar to each of (n, 4, S, S) uint8, by tokens and by pixels."""
        found = {}
        for kind, vector in describe(encoder, images.float() / 255).items():
            query = F.normalize(vector - self.means[kind], dim=1)
            found[kind] = [self.chosen[i] for i in (query @ self.vectors[kind].T).argmax(1).tolist()]
        return found

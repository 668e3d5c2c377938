"""Several structures of one image, averaged to one.

One sample of the structure DiT is one of the shapes that the image may show. The voxels that most samples agree on are
nearer to the true shape than those of any one of them: see benchmarks/results/structure-samples-h200.md.

Sizes: B images, n structures of each, S voxels per edge. The batch holds the first structure of each image, then the
second of each, and so on.
"""

from collections.abc import Sequence

from torch import Tensor

from .networks.image_encoder import ImageTokens

STREAM = 0x5EED_0F_5A3B1E  # so that the noises of neighbouring seeds have nothing in common


def seeds_of(seeds: Sequence[int], number: int) -> list[int]:
    """Return the seeds of n structures for each of B seeds, (n B); the first structure has the seed itself."""
    return [seed ^ (STREAM * k) % (1 << 63) for k in range(number) for seed in seeds]


def tokens_of(image_tokens: ImageTokens, number: int) -> ImageTokens:
    """Repeat the tokens of B images n times."""
    return ImageTokens.cat([image_tokens] * number) if number > 1 else image_tokens


def mean_logits(logits: Tensor, number: int) -> Tensor:
    """Average the probabilities of n structures.

    Args:
        logits: (n B, 1, S, S, S).

    Returns:
        The logits of the mean probabilities, (B, 1, S, S, S).
    """
    if number == 1:
        return logits
    return logits.float().unflatten(0, (number, -1)).sigmoid().mean(0).logit()

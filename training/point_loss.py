"""An auxiliary task of the image encoder: to tell where in space each patch sees the object.

A structure is a single answer for a whole picture, so an encoder can learn it by recognising the training shapes. Where
a surface lies is an answer for every patch, and holds for shapes that were never seen. A linear head, which is not
exported, predicts it from the tokens; so the tokens carry it to the networks that read them. The targets are the point
maps of render_views (`training.data.point_maps`), in the cube as the shape is turned to the camera. None of it comes
from the paper. [D: see docs/paper.md]

Sizes: B pictures, P patches per edge, L tokens of all pictures, C channels, E cells per edge of the point maps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3ds2.networks.image_encoder import ImageTokens

CELLS = 2  # per edge of a patch, each with a point of its own
MIN_SEEN = 0.5  # share of a cell that sees the object; others do not count


@dataclass(frozen=True)
class PointLossConfig:
    """The loss of the points that the image tokens tell; none of it comes from the paper [D]."""

    weight: float = 1.0

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"expected points.weight > 0, got {self.weight}")


class PointHead(nn.Module):
    """Predict the points that the cells of each patch see, from the patch's token."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, 3 * CELLS**2)
        nn.init.zeros_(self.linear.weight)  # all points begin near the centre

    def forward(self, tokens: ImageTokens, patches: int) -> Tensor:
        """Predict from the tokens of pictures with `patches` per edge: (B, 3, 2 P, 2 P) in [-1, 1], if they are right.

        Raises as `patch_features`.
        """
        made = (
            self.linear(patch_features(tokens, patches)).unflatten(1, (patches, patches)).permute(0, 3, 1, 2)
        )  # (B, 12, P, P)
        return F.pixel_shuffle(made, CELLS)


def patch_features(tokens: ImageTokens, patches: int) -> Tensor:
    """Return the features of the patches alone, row by row: (B, P², C).

    Raises:
        ValueError: the tokens are not all those of each picture.
    """
    if tokens.per_image is None:
        raise ValueError("expected all tokens of each picture, got a selection")
    return tokens.features.unflatten(0, (tokens.batch_size, -1))[:, -(patches**2) :]  # after class and registers


def points_of_cells(points: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return the mean point that each cell sees, (B, 3, n, n), and whether the cell counts, (B, n, n) bool.

    Args:
        points: (B, 4, E, E), as for `point_loss`.
        cells: per edge of a picture, n.
    """
    points = F.adaptive_avg_pool2d(points.float(), cells)
    share = points[:, 3]
    return points[:, :3] / share.clamp(min=MIN_SEEN)[:, None], share >= MIN_SEEN


def point_loss(predicted: Tensor, points: Tensor) -> Tensor:
    """Average the distances between predicted and true points over the cells of each picture, and over pictures.

    Args:
        predicted: (B, 3, 2 P, 2 P).
        points: (B, 4, E, E), E a multiple of 2 P: x, y, z, multiplied by the share of the cell that sees the object,
            which comes last.

    Returns:
        The mean distance, a scalar float32, in units of the cube [-1, 1]³. A picture without any such cell counts as 0.
    """
    target, counts = points_of_cells(points, predicted.shape[-1])
    distance = torch.linalg.vector_norm(predicted.float() - target, dim=1) * counts  # (B, 2 P, 2 P)
    return (distance.flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)).mean()

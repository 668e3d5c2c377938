"""Normal-FID: the Fréchet distance between Inception features of rendered normals, of results and of true shapes.

Features are those of the InceptionV3 of FID (Heusel et al. 2017), from a file that the user gives: the PyTorch port
`pt_inception-2015-12-05-6726825d.pth`, whose names of tensors this network has. It differs from torchvision's network:
averages leave out the padding, and the last block takes maxima. The names and shapes were compared with torchvision's;
the published weights themselves have not been tried.

Sizes: n pictures, S pixels per edge, D = 2048 features.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.evaluation.tensor_files import load_tensors, read_tensors

FEATURES = 2048
INPUT = 299  # pixels per edge


# --- the network


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padding=(0, 0)):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, H, W) -> (N, out, H', W')."""
        return F.relu(self.bn(self.conv(x)))


POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "half": lambda x: F.max_pool2d(x, 3, 2),
}


class Mixed(nn.Module):
    """Branches side by side, joined along the channels: each is a chain of convolutions, after a pool or not.

    Args:
        channels: of the input.
        branches: chains of (name, out, kernel) or of the names of pools. A kernel is "3", "1x7", or "3/2" with a stride
            of 2. Branches may begin with the same convolution.
    """

    def __init__(self, channels: int, *branches: tuple):
        super().__init__()
        self.chains = []
        for branch in branches:
            width, chain = channels, []
            for step in branch:
                if step in POOLS:
                    chain.append(step)
                    continue
                name, out, shape = step
                size, _, stride = shape.partition("/")
                rows, _, columns = size.partition("x")
                kernel = int(rows), int(columns or rows)
                padding = (0, 0) if stride else (kernel[0] // 2, kernel[1] // 2)
                if not hasattr(self, name):
                    self.add_module(name, ConvNorm(width, out, kernel, int(stride or 1), padding))
                chain.append(name)
                width = out
            self.chains.append(chain)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, H, W) -> (N, the branches' channels together, H', W')."""
        outputs = []
        for chain in self.chains:
            h = x
            for name in chain:
                h = POOLS[name](h) if name in POOLS else getattr(self, name)(h)
            outputs.append(h)
        return torch.cat(outputs, 1)


def mixed_5(channels: int, pooled: int) -> Mixed:
    """A block at 35 x 35 pixels."""
    return Mixed(
        channels,
        (("branch1x1", 64, "1"),),
        (("branch5x5_1", 48, "1"), ("branch5x5_2", 64, "5")),
        (("branch3x3dbl_1", 64, "1"), ("branch3x3dbl_2", 96, "3"), ("branch3x3dbl_3", 96, "3")),
        ("average", ("branch_pool", pooled, "1")),
    )


def mixed_6(width: int) -> Mixed:
    """A block at 17 x 17 pixels."""
    return Mixed(
        768,
        (("branch1x1", 192, "1"),),
        (("branch7x7_1", width, "1"), ("branch7x7_2", width, "1x7"), ("branch7x7_3", 192, "7x1")),
        (
            *(("branch7x7dbl_1", width, "1"), ("branch7x7dbl_2", width, "7x1"), ("branch7x7dbl_3", width, "1x7")),
            *(("branch7x7dbl_4", width, "7x1"), ("branch7x7dbl_5", 192, "1x7")),
        ),
        ("average", ("branch_pool", 192, "1")),
    )


def mixed_7(channels: int, pool: str) -> Mixed:
    """A block at 8 x 8 pixels."""
    single, double = ("branch3x3_1", 384, "1"), (("branch3x3dbl_1", 448, "1"), ("branch3x3dbl_2", 384, "3"))
    return Mixed(
        channels,
        (("branch1x1", 320, "1"),),
        (single, ("branch3x3_2a", 384, "1x3")),
        (single, ("branch3x3_2b", 384, "3x1")),
        (*double, ("branch3x3dbl_3a", 384, "1x3")),
        (*double, ("branch3x3dbl_3b", 384, "3x1")),
        (pool, ("branch_pool", 192, "1")),
    )


class FIDInception(nn.Module):
    """The InceptionV3 of FID up to its last average: pictures -> features."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(
            288,
            (("branch3x3", 384, "3/2"),),
            (("branch3x3dbl_1", 64, "1"), ("branch3x3dbl_2", 96, "3"), ("branch3x3dbl_3", 96, "3/2")),
            ("half",),
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_6, (128, 160, 160, 192))
        self.Mixed_7a = Mixed(
            768,
            (("branch3x3_1", 192, "1"), ("branch3x3_2", 320, "3/2")),
            (
                *(("branch7x7x3_1", 192, "1"), ("branch7x7x3_2", 192, "1x7")),
                *(("branch7x7x3_3", 192, "7x1"), ("branch7x7x3_4", 192, "3/2")),
            ),
            ("half",),
        )
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "average"), mixed_7(2048, "maximum")

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 3, S, S) in [0, 1] -> (n, D)."""
        x = 2 * F.interpolate(pictures, (INPUT, INPUT), mode="bilinear", align_corners=False) - 1
        for name, layer in self.named_children():
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = POOLS["half"](x)
        return x.mean((2, 3))


def load_inception(file: str | Path, device: torch.device) -> FIDInception:
    """Load the network from a file of its weights; those of the last layer, which gives classes, are left out.

    Raises:
        ValueError: the file is not of this network.
        OSError: it cannot be read.
    """
    network = FIDInception()
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if not name.startswith("fc.")}
    load_tensors(network, tensors, file, "the InceptionV3 of FID")
    return network.to(device).eval()


# --- features and their distance


@torch.no_grad()
def features_of(network: FIDInception, pictures: np.ndarray) -> np.ndarray:
    """Compute the features (n, D) float64 of pictures (n, S, S, 3) uint8."""
    weight = next(network.parameters())
    images = torch.from_numpy(pictures).to(weight.device).movedim(-1, 1).to(weight.dtype) / 255
    return network(images).double().cpu().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Fréchet distance of two sets of features (n, D), (m, D), each taken for a normal distribution.

    |μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½). With the centred features A and B as rows, the eigenvalues of C_a C_b
    are the squared singular values of A Bᵀ, over (n - 1)(m - 1): no square root of a matrix is needed.

    Raises:
        ValueError: fewer than two features in a set.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least two pictures in each set, got {len(a)} and {len(b)}")
    means, roots = [a.mean(0), b.mean(0)], []
    for features, mean in zip((a, b), means, strict=True):
        roots.append(np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r"))  # C = Rᵀ R
    common = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + sum(np.square(r).sum() for r in roots) - 2 * common)

"""Image encoders that put pictures beside shapes or other pictures: CLIP by transformers, EVA-CLIP by timm.

Both come from local files alone. ULIP-2 and OpenShape were trained against OpenCLIP's ViT-bigG-14 (laion2b_s39b_b160k),
which its folder also offers in the format of transformers; Uni3D against EVA02-E-14-plus, whose file is that of
open_clip. The published weights themselves have not been tried.

Sizes: B pictures, S pixels per edge, D of the result.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.evaluation.point_encoders import make_eva
from training.evaluation.tensor_files import load_tensors, read_tensors, under

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels
EVA, EVA_CLASSES = "eva02_enormous_patch14_clip_224", 1024


class ImageTower(nn.Module):
    """A network from pixels to vectors, with what comes before it: resizing and normalising.

    Args:
        network: (B, 3, size, size) -> (B, D).
        size: pixels per edge.
    """

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed pictures (B, 3, S, S) in [0, 1], on white: (B, D) float32 of length 1."""
        size = self.size, self.size
        pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        weight = next(self.network.parameters())
        return F.normalize(self.network(((pixels - self.mean) / self.std).to(weight.dtype)).float(), dim=-1)


class CLIPVision(nn.Module):
    """The image tower of CLIP in transformers, whose result is a plain tensor here."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, D)."""
        return self.model(pixel_values=pixels).image_embeds


def load_clip(folder: str | Path, device: torch.device, dtype: torch.dtype) -> ImageTower:
    """Load the image tower of a CLIP from a folder of transformers: config.json and model.safetensors.

    Raises:
        ValueError: the folder does not hold a whole CLIP.
    """
    from safetensors import SafetensorError
    from transformers import CLIPVisionModelWithProjection  # imported here: it is slow

    if not Path(folder).is_dir():
        raise ValueError(f"expected a folder of transformers with a CLIP, got {folder}")
    try:
        model, report = CLIPVisionModelWithProjection.from_pretrained(
            str(folder), local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"expected a CLIP of transformers in {folder}: {str(error).splitlines()[0]}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"expected a CLIP of transformers in {folder}: no {missing[0]} and {len(missing) - 1} others")
    return ImageTower(CLIPVision(model), model.config.image_size).to(device).eval()


def load_eva(file: str | Path, device: torch.device, dtype: torch.dtype) -> ImageTower:
    """Load the image tower of EVA02-E-14-plus from the file of open_clip.

    Raises:
        ValueError: the file is damaged or of another network.
        OSError: it cannot be read.
        ImportError: timm is not installed.
    """
    tensors = under(read_tensors(file), "visual.trunk.")
    with torch.device("meta"):
        network = make_eva(EVA, EVA_CLASSES, "token")
    network = network.to(dtype).to_empty(device=device)
    load_tensors(network, tensors, file, "EVA02-E-14-plus of open_clip")
    return ImageTower(network, network.patch_embed.img_size[0]).to(device).eval()

"""Image -> image tokens: DINOv2 with registers, then only patches that touch the foreground are kept (eq. 9).

With `backbone`, the tokens that enter the transformer come from a convolutional network, see `efficientnet_lite`.

Sizes named in this file:
    B  images        S  pixels per edge        P  patches per edge, S / patch_size
    L  tokens, all images packed: for each image the class token, the registers, then the patches row by row
    C  channels per token
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .efficientnet_lite import BACKBONES, LARGEST_STRIDE, PIXEL_MEAN, PIXEL_STD, TOKEN_STRIDE, BackbonePatches
from .sizes import check_sizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageTokens:
    """A packed batch of image tokens.

    Args:
        features: (L, C).
        coords: (L, 4) int32 [batch, x, y, z]; class token and registers (b, 0, 0, 1), patches (b, column, row, 0).
            Sorted by batch.
        foreground: (L,) bool, True where the patch touches the object; always True for class token and registers.
        batch_size: number of images, B.
        per_image: tokens of each image, where all have equally many; None: they are counted when `counts` is read, for
            which the host waits for the device.

    Raises:
        ValueError: if the shapes do not fit together.
    """

    features: Tensor
    coords: Tensor
    foreground: Tensor
    batch_size: int
    per_image: int | None = None

    def __post_init__(self):
        L = len(self.features)
        if self.features.ndim != 2 or self.coords.shape != (L, 4) or self.foreground.shape != (L,):
            raise ValueError(
                f"expected features (L, C), coords (L, 4), foreground (L,), got {tuple(self.features.shape)}, "
                f"{tuple(self.coords.shape)}, {tuple(self.foreground.shape)}"
            )
        if self.per_image is not None and self.per_image * self.batch_size != L:
            raise ValueError(f"expected {self.batch_size} times {self.per_image} tokens, got {L}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def device(self) -> torch.device:
        return self.features.device

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each image."""
        if self.per_image is not None:
            return [self.per_image] * self.batch_size
        return torch.bincount(self.coords[:, 0], minlength=self.batch_size).tolist()

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """First token of each image and, last, L: (B + 1,) int32."""
        if self.per_image is not None:
            return torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.device) * self.per_image
        offsets = torch.tensor([0, *self.counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return offsets.to(self.device)

    def select_foreground(self) -> "ImageTokens":
        """Return the tokens that see the object: class token, registers and foreground patches, f of eq. 9."""
        keep = self.foreground
        return ImageTokens(self.features[keep], self.coords[keep], self.foreground[keep], self.batch_size)

    def zeroed(self) -> "ImageTokens":
        """Return the unconditional tokens: zero features at the same coordinates."""
        return replace(self, features=torch.zeros_like(self.features))

    def where(self, keep: Tensor) -> "ImageTokens":
        """Zero the features of images whose entry in `keep` (B,) bool is False, to drop the condition in training."""
        kept = keep.to(self.device)[self.coords[:, 0].long(), None]
        return replace(self, features=self.features * kept)

    def sample(self, index: int) -> "ImageTokens":
        """Return the tokens of one image as a batch of one. Raises ValueError for an index outside the batch."""
        if not 0 <= index < self.batch_size:
            raise ValueError(f"expected an image index below {self.batch_size}, got {index}")
        first = sum(self.counts[:index])
        rows = slice(first, first + self.counts[index])
        coords = self.coords[rows].clone()
        coords[:, 0] = 0
        return ImageTokens(self.features[rows], coords, self.foreground[rows], 1)

    @staticmethod
    def cat(batches: "list[ImageTokens]") -> "ImageTokens":
        """Join batches into one: the images of the first, then those of the second, and so on."""
        coords, batch_size = [], 0
        for tokens in batches:
            offset = torch.tensor([batch_size, 0, 0, 0], dtype=torch.int32, device=tokens.device)
            coords.append(tokens.coords + offset)
            batch_size += tokens.batch_size
        features = torch.cat([tokens.features for tokens in batches])
        foreground = torch.cat([tokens.foreground for tokens in batches])
        numbers = {tokens.per_image for tokens in batches}
        return ImageTokens(features, torch.cat(coords), foreground, batch_size, *(numbers if len(numbers) == 1 else ()))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ImageTokens":
        """Move all tensors; only the features take `dtype`."""
        features = self.features.to(device=device, dtype=dtype)
        return replace(self, features=features, coords=self.coords.to(device), foreground=self.foreground.to(device))


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of the vision transformer. The defaults are those of DINOv2 ViT-L/14 with registers, which the paper uses.

    `backbone` names a network of `efficientnet_lite` that makes the tokens of the patches, with a patch_size of 16;
    with "", a token is a projection of the patch's pixels. Raises ValueError for sizes that do not fit together.
    """

    image_size: int = 518
    patch_size: int = 14
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: int = 4
    num_registers: int = 4
    backbone: str = ""

    def __post_init__(self):
        check_sizes(self)
        if self.backbone and self.backbone not in BACKBONES:
            raise ValueError(f"expected a backbone of {sorted(BACKBONES)}, or none, got {self.backbone!r}")
        if self.backbone and (self.patch_size != TOKEN_STRIDE or self.image_size % LARGEST_STRIDE):
            raise ValueError(
                f"expected patch_size {TOKEN_STRIDE} and image_size divisible by {LARGEST_STRIDE} with a backbone, got "
                f"{self.patch_size} and {self.image_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"expected image_size divisible by {self.patch_size}, got {self.image_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"expected hidden_size divisible by {self.num_heads} heads, got {self.hidden_size}")


# names of the projections in transformers 5.2x -> names in the published weights and in all earlier versions
PUBLISHED_NAMES = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}


class ImageEncoder(nn.Module):
    """DINOv2 with registers, as transformers implements it, without its final norm: E of eq. 9.

    A new encoder has random weights; nothing is downloaded. `from_dinov2` reads pretrained weights from a folder, and
    `patches.backbone.load_published` those of a backbone from a file. The state dict uses the names of the published
    weights, whatever the installed transformers calls its layers.
    """

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel  # a slow import, so only here

        self.config = config
        model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                mlp_ratio=config.mlp_ratio,
                num_register_tokens=config.num_registers,
                attn_implementation="sdpa",
            )
        )
        self.embeddings = model.embeddings
        self.encoder = model.encoder
        if config.backbone:
            self.embeddings.patch_embeddings = BackbonePatches(config.backbone, config.hidden_size)
        self.embeddings.mask_token = None  # only DINOv2's own pretraining reads it
        # transformers starts all registers at zero; equal tokens without a position would stay equal forever
        nn.init.trunc_normal_(self.embeddings.register_tokens, std=0.02)
        self.register_state_dict_post_hook(_to_published_names)
        self.register_load_state_dict_pre_hook(_to_installed_names)

    @property
    def patches(self) -> BackbonePatches | None:
        """The module with the backbone, whose tokens enter the transformer; None without one."""
        return self.embeddings.patch_embeddings if self.config.backbone else None

    @classmethod
    def from_dinov2(cls, folder: str | Path) -> "ImageEncoder":
        """Load pretrained DINOv2 with registers from a local folder of transformers (config.json, model.safetensors).

        Raises:
            ValueError: if the folder holds no such model, or another variant (the giant one, with SwiGLU).
        """
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"expected a transformers folder of DINOv2 with registers, got no config.json in {folder}")
        theirs = Dinov2WithRegistersConfig.from_pretrained(folder, local_files_only=True)
        form = (theirs.model_type, theirs.use_swiglu_ffn, theirs.qkv_bias, theirs.hidden_act, theirs.layer_norm_eps)
        if form != ("dinov2_with_registers", False, True, "gelu", 1e-6):
            raise ValueError(f"expected DINOv2 with registers, small to large, in {folder}, got {form}")
        config = ImageEncoderConfig(
            image_size=theirs.image_size,
            patch_size=theirs.patch_size,
            hidden_size=theirs.hidden_size,
            depth=theirs.num_hidden_layers,
            num_heads=theirs.num_attention_heads,
            mlp_ratio=theirs.mlp_ratio,
            num_registers=theirs.num_register_tokens,
        )
        model = Dinov2WithRegistersModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        with torch.device("meta"):
            encoder = cls(config)
        wanted = encoder.state_dict()
        weights = {published_name(name): weight for name, weight in model.state_dict().items()}
        encoder.load_state_dict({name: weights[name] for name in wanted}, strict=True, assign=True)
        return encoder.eval()

    def forward(self, images: Tensor) -> ImageTokens:
        """Encode a batch of preprocessed images.

        Args:
            images: (B, 4, S, S) floats in [0, 1]: the object on white, and its mask.

        Returns:
            All tokens, L = B (1 + num_registers + P²), with layer-normed features (eps 1e-5, no weight or bias).

        Raises:
            ValueError: for another shape.
        """
        B, S = len(images), self.config.image_size
        if images.shape != (B, 4, S, S):
            raise ValueError(f"expected images (B, 4, {S}, {S}), got {tuple(images.shape)}")
        mean, std = (PIXEL_MEAN, PIXEL_STD) if self.config.backbone else (IMAGENET_MEAN, IMAGENET_STD)
        channels = zip(images.unbind(1), mean, std, strict=False)  # the mask, last, has no partner
        pixels = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)  # (B, 3, S, S)
        hidden = self.encoder(self.embeddings(pixels)).last_hidden_state  # (B, 1 + registers + P * P, C)
        features = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-5).to(hidden.dtype)
        coords, foreground = self._coords(B, images.device), self._foreground(images[:, 3])
        return ImageTokens(features.flatten(0, 1), coords, foreground, B, features.shape[1])

    def _coords(self, batch_size: int, device: torch.device) -> Tensor:
        """Coordinates (L, 4) int32 [batch, x, y, z] of the tokens of `batch_size` images."""
        P, num_special = self.config.image_size // self.config.patch_size, 1 + self.config.num_registers
        place = torch.arange(-num_special, P * P, dtype=torch.int32, device=device).repeat(batch_size)
        batch = torch.arange(len(place), dtype=torch.int32, device=device) // (num_special + P * P)
        is_patch = (place >= 0).int()
        return torch.stack([batch, place % P * is_patch, place // P * is_patch, 1 - is_patch], dim=1)

    def _foreground(self, masks: Tensor) -> Tensor:
        """Masks (B, S, S) -> (L,) bool, True for patches that hold a foreground pixel and for all other tokens."""
        is_object = F.max_pool2d(masks[:, None].float(), self.config.patch_size).flatten(1) > 0  # (B, P * P)
        return F.pad(is_object, (1 + self.config.num_registers, 0), value=True).flatten()


def published_name(name: str) -> str:
    """Return the name of a parameter in the published weights, given its name in any version of transformers."""
    for installed, published in PUBLISHED_NAMES.items():
        name = name.replace(installed, published)
    return name


def _to_published_names(module: ImageEncoder, state_dict: dict, prefix: str, _metadata) -> None:
    _rename(state_dict, prefix, {name: published_name(name) for name, _ in module.named_parameters()})


def _to_installed_names(module: ImageEncoder, state_dict: dict, prefix: str, *_) -> None:
    _rename(state_dict, prefix, {published_name(name): name for name, _ in module.named_parameters()})


def _rename(state_dict: dict, prefix: str, names: dict[str, str]) -> None:
    for old, new in names.items():
        if old != new and prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)

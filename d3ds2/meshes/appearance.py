"""How a mesh looks: texture coordinates, textures and vertex colours, and which of them a file can hold.

Sizes:
    V  vertices     H, W  pixels of a texture
"""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

# what each kind of file holds, by the fields of `Appearance`
HELD = {
    ".glb": ("uvs", "textures", "colors"),
    ".obj": ("uvs", "colors"),
    ".ply": ("colors",),
    ".stl": (),
    ".3mf": (),
}
IN_WORDS = {"uvs": "UVs", "textures": "textures", "colors": "vertex colours"}
GLTF_TEXTURES = {  # by the names that ComfyUI's MESH gives them
    "texture": "baseColorTexture",
    "metallic_roughness": "metallicRoughnessTexture",
    "normal_map": "normalTexture",
    "occlusion": "occlusionTexture",
    "emissive": "emissiveTexture",
}
WHITE = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Appearance:
    """The look of a mesh with V vertices; what is absent is None or empty.

    Attributes:
        uvs: (V, 2) float32; (0, 0) is the upper left corner of a texture, as in glTF.
        textures: (H, W, 3) uint8 by the names of GLTF_TEXTURES.
        colors: (V, 3) or (V, 4) float32 in [0, 1], as glTF multiplies them with the texture.

    Raises:
        ValueError: for another shape, or a number that is not finite.
    """

    uvs: np.ndarray | None = None
    textures: dict[str, np.ndarray] = field(default_factory=dict)
    colors: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, rows, widths in (("uvs", self.uvs, (2,)), ("colors", self.colors, (3, 4))):
            if rows is not None and (rows.ndim != 2 or rows.shape[1] not in widths or not np.isfinite(rows).all()):
                raise ValueError(f"expected finite {name} (V, {' or '.join(map(str, widths))}), got {rows.shape}")
        for name, pixels in self.textures.items():
            if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
                raise ValueError(f"expected a {name} (H, W, 3), got {pixels.shape}")

    @property
    def parts(self) -> list[str]:
        """The names of the fields that are there."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return [name for name, value in values.items() if value is not None and len(value)]


def in_words(parts: list[str]) -> str:
    """Return names of fields as a reader knows them, such as "UVs, textures and vertex colours"."""
    *first, last = [IN_WORDS[part] for part in parts] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def not_held(appearance: Appearance, kind: str) -> str:
    """Return in words what a file of a kind (its extension with the dot) does not hold of it; empty if it holds all."""
    return in_words([part for part in appearance.parts if part not in HELD[kind]])


def gltf_visual(appearance: Appearance, grey: tuple[float, ...], roughness: float) -> Any:
    """Return trimesh's visual of a look. The base colour is grey only where nothing else gives a colour."""
    import trimesh
    from PIL import Image

    images = {
        GLTF_TEXTURES[name]: Image.fromarray(pixels)
        for name, pixels in appearance.textures.items()
        if appearance.uvs is not None
    }
    colored = appearance.colors is not None or "baseColorTexture" in images
    has_map = "metallicRoughnessTexture" in images  # its values are multiplied with the factors
    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=WHITE if colored else grey,
        metallicFactor=1.0 if has_map else 0.0,
        roughnessFactor=1.0 if has_map else roughness,
        emissiveFactor=[1.0, 1.0, 1.0] if "emissiveTexture" in images else None,
        **images,
    )
    uvs = None if appearance.uvs is None else appearance.uvs * [1, -1] + [0, 1]  # trimesh has (0, 0) at the lower left
    visual = trimesh.visual.TextureVisuals(uv=uvs, material=material)
    if appearance.colors is not None:
        visual.vertex_attributes["color"] = color_bytes(appearance.colors)
    return visual


def color_bytes(colors: np.ndarray) -> np.ndarray:
    """Return colours (V, 3) or (V, 4) in [0, 1] as (V, 4) uint8."""
    opaque = np.ones((len(colors), 4), np.float32)
    opaque[:, : colors.shape[1]] = colors
    return (opaque.clip(0, 1) * 255).round().astype(np.uint8)

"""The colours of meshes that trimesh has read: one colour for each face, or textures and colours of corners."""

import hashlib

import numpy as np
import trimesh
from PIL import Image

from d3ds2.images.srgb import to_bytes
from d3ds2.images.surface_colors import PLAIN, SurfaceColors

WHITE = 255


def face_colors(part: trimesh.Trimesh) -> np.ndarray:
    """Return the colours of the faces, (F,3) uint8; a texture is read at the corners of each face and averaged."""
    visual = part.visual
    if not isinstance(visual, trimesh.visual.TextureVisuals):
        return np.asarray(visual.face_colors)[:, :3].astype(np.uint8)
    corners = None if visual.uv is None else np.asarray(visual.material.to_color(visual.uv))
    if corners is None or corners.ndim != 2 or len(corners) != len(part.vertices):  # no texture: one plain colour
        return np.tile(np.asarray(visual.material.main_color, dtype=np.uint8)[:3], (len(part.faces), 1))
    return corners[:, :3][part.faces].mean(axis=1).astype(np.uint8)


def surface_colors(parts: list[trimesh.Trimesh], linear: bool) -> SurfaceColors | np.ndarray:
    """Return the colours of all points of all parts, or (F,3) uint8 if each face has one colour.

    Args:
        linear: colours of materials and vertices are linear, as in glTF; else sRGB. Textures are always sRGB.
    """
    corners, pictures, numbers = np.concatenate([_corner_colors(part) for part in parts]), [], {}
    if linear:
        corners = to_bytes(corners / 255)
    uv, texture = np.zeros((len(corners), 3, 2), np.float32), np.full(len(corners), PLAIN)
    first = 0
    for part in parts:
        here = slice(first, first + len(part.faces))
        first = here.stop
        picture, uv_of_vertices = _picture(part), getattr(part.visual, "uv", None)
        if picture is None or uv_of_vertices is None or uv_of_vertices.shape != (len(part.vertices), 2):
            continue
        picture = picture.convert("RGB")
        content = hashlib.blake2b(picture.tobytes()).digest()  # parts may hold copies of one texture
        if content not in numbers:
            numbers[content] = len(pictures)
            pictures.append(picture)
        uv[here], texture[here] = uv_of_vertices[part.faces], numbers[content]
    if not pictures and (corners == corners[:, :1]).all():
        return corners[:, 0]
    return SurfaceColors(corners, np.nan_to_num(uv, posinf=0, neginf=0), texture, pictures)


def _picture(part: trimesh.Trimesh) -> Image.Image | None:
    material = getattr(part.visual, "material", None)
    return getattr(material, "baseColorTexture", None) or getattr(material, "image", None)


def _corner_colors(part: trimesh.Trimesh) -> np.ndarray:
    """Return the colours at the corners of the faces, (F,3,3) uint8, without the texture."""
    visual, number = part.visual, len(part.faces)
    if not isinstance(visual, trimesh.visual.TextureVisuals):
        if visual.kind == "vertex":
            return np.asarray(visual.vertex_colors)[:, :3].astype(np.uint8)[part.faces]
        return np.repeat(np.asarray(visual.face_colors)[:, None, :3].astype(np.uint8), 3, axis=1)
    plain = getattr(visual.material, "baseColorFactor", None)
    if _picture(part) is None:  # beside a texture, a diffuse colour is often a grey that was not meant
        plain = visual.material.main_color
    plain = np.full(3, WHITE) if plain is None else np.asarray(plain)[:3]
    colors = np.asarray(visual.vertex_attributes.get("color", np.full((1, 3), WHITE)))
    if len(colors) != len(part.vertices):
        return np.tile(plain.astype(np.uint8), (number, 3, 1))
    share = colors[:, :3] if colors.dtype.kind == "f" else colors[:, :3] / np.iinfo(colors.dtype).max
    return np.round(share * plain).clip(0, WHITE).astype(np.uint8)[part.faces]

"""Deformed copies of training meshes: further shapes of the same kinds, so that the networks learn kinds, not meshes.

A copy is stretched along each axis, and its width changes along its height: toward the top, and toward the middle. What
is upright, level or symmetric stays so. Colours and textures stay on their faces.

    series k of a mesh `chair` is the mesh `chair~k`, and depends on this name alone
"""

import numpy as np

from training.data.named_generators import generator_of

STRETCH = 0.18  # deviation of the logarithm of an axis' factor
TAPER = 0.25  # largest relative change of the width toward the top, and the opposite one toward the bottom
BULGE = 0.2  # largest relative change of the width halfway up


def name_of_copy(name: str, series: int) -> str:
    """Return the name of a mesh's copy, or its own name for series 0."""
    return f"{name}~{series}" if series else name


def deform(vertices: np.ndarray, name: str) -> np.ndarray:
    """Deform a mesh, Y up, in the way that belongs to the name of the copy: vertices (V,3), returned as float32."""
    rng = generator_of(name)
    factors = np.exp(STRETCH * rng.standard_normal(3).clip(-2, 2))
    taper, bulge = rng.uniform(-TAPER, TAPER), rng.uniform(-BULGE, BULGE)

    low, high = vertices.min(0).astype(np.float64), vertices.max(0).astype(np.float64)
    centre, half = (low + high) / 2, np.maximum((high - low) / 2, 1e-12)
    moved = vertices - centre
    height = moved[:, 1] / half[1]  # -1 at the bottom, 1 at the top
    moved[:, [0, 2]] *= (1 + taper * height + bulge * (1 - height**2))[:, None]
    return (centre + moved * factors).astype(np.float32)

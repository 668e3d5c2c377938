"""A mesh file of any common kind -> its parts, placed as in its scene: what nodes, command line and training read.

trimesh reads the files. Before and after it, what it reads wrongly is put right: polygons that are not convex,
triangle strips, bytes after an STL, tabs and byte order marks in an OBJ, and glTF that it would read as zeros.
"""

import io
import re
import warnings
from bisect import bisect_left
from pathlib import Path

import numpy as np
import trimesh
from trimesh.resolvers import FilePathResolver

from .gltf_check import check_gltf
from .polygons import triangulate

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
STL_HEADER, STL_TRIANGLE = 84, 50  # bytes
OBJ_VERTEX = re.compile(r"^[ \t]*v[ \t]+(\S+)[ \t]+(\S+)[ \t]+(\S+)", re.MULTILINE)
OBJ_POLYGON = re.compile(r"^[ \t]*f((?:[ \t]+[^\s#]+){4,})[ \t]*(?:#.*)?$", re.MULTILINE)


def read_parts(source: bytes | Path, kind: str) -> list[trimesh.Trimesh]:
    """Read the parts of a mesh file, in the axes and units of its scene, with colours and textures where it has them.

    Args:
        source: the content of the file, or its path; with a path, files beside it are read too (.bin, .mtl, textures).
        kind: its extension, one of SUFFIXES.

    Raises:
        ValueError: the file is damaged, or needs something that is not here.
        OSError: the file cannot be read.
        Exception: a loader can fail in any other way with a strange file.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # an error says what is wrong
        warnings.simplefilter("ignore")
        return _read_parts(source, kind)


def _read_parts(source: bytes | Path, kind: str) -> list[trimesh.Trimesh]:
    data = source.read_bytes() if isinstance(source, Path) else source
    resolver = FilePathResolver(str(source)) if isinstance(source, Path) else None
    if kind in (".glb", ".gltf"):
        check_gltf(data, is_binary=kind == ".glb")
        if kind == ".gltf" and resolver is None and _names_files(data):
            raise ValueError("the .gltf names other files, which did not come with it: give the GLB, or a path")
    elif kind == ".obj":
        data = _without_polygons(data.decode("utf-8-sig", errors="replace").replace("\t", " ")).encode()
    elif kind == ".stl":
        data = _without_trailing_bytes(data)
    elif kind == ".ply" and (part := _read_ply(data)) is not None:
        return [part]
    elif kind == ".off":
        return [_read_off(data.decode("utf-8-sig", errors="replace"))]
    scene = trimesh.load_scene(io.BytesIO(data), file_type=kind[1:], resolver=resolver)
    return [part for part in scene.dump() if isinstance(part, trimesh.Trimesh) and len(part.faces)]


def _names_files(data: bytes) -> bool:
    return re.search(rb'"uri"\s*:\s*"(?!data:)', data) is not None


def _without_polygons(text: str) -> str:
    """Rewrite the faces of an OBJ that have more than three corners as triangles."""
    if OBJ_POLYGON.search(text) is None:
        return text
    found = list(OBJ_VERTEX.finditer(text))
    starts = [match.start() for match in found]
    vertices = np.array([match.groups() for match in found], dtype=np.float64).reshape(-1, 3)
    lines = list(OBJ_POLYGON.finditer(text))
    corners = [match.group(1).split() for match in lines]
    polygons = [
        np.array([_obj_index(corner, bisect_left(starts, match.start())) for corner in own])
        for match, own in zip(lines, corners, strict=True)
    ]
    faces, owner = triangulate(vertices, polygons)
    flat = [corner for own in corners for corner in own]
    triangles: list[list[str]] = [[] for _ in lines]
    for face, polygon in zip(faces.tolist(), owner.tolist(), strict=True):
        triangles[polygon].append("f " + " ".join(flat[corner] for corner in face))
    rewritten = iter(triangles)
    return OBJ_POLYGON.sub(lambda match: "\n".join(next(rewritten)), text)


def _obj_index(corner: str, before: int) -> int:
    """The vertex of a corner such as 3/1/2, counted from 0; negative ones count back from those before the line."""
    index = int(corner.split("/")[0])
    return index - 1 if index > 0 else before + index


def _without_trailing_bytes(data: bytes) -> bytes:
    """Cut a binary STL after the triangles that its header counts."""
    if len(data) < STL_HEADER:
        return data
    end = STL_HEADER + STL_TRIANGLE * int.from_bytes(data[STL_HEADER - 4 : STL_HEADER], "little")
    is_text = data[:5].lower() == b"solid" and b"facet" in data[:1024]
    return data if is_text or end > len(data) else data[:end]


def _read_ply(data: bytes) -> trimesh.Trimesh | None:
    """Read a PLY of polygons or triangle strips; None if trimesh reads it well: points of triangles alone."""
    end = data.find(b"end_header")
    header = data[: max(0, end)].decode("ascii", errors="replace")
    strips = "element tristrips" in header
    if "element face" not in header and not strips:
        return None
    from plyfile import PlyData

    ply = PlyData.read(io.BytesIO(data))
    vertex = ply["vertex"].data
    if strips:
        polygons = _strips(ply["tristrips"].data[ply["tristrips"].data.dtype.names[0]])
    else:
        names = ply["face"].data.dtype.names
        polygons = ply["face"].data[next((n for n in names if n in ("vertex_indices", "vertex_index")), names[0])]
        lengths = np.array([len(polygon) for polygon in polygons])
        if (lengths == 3).all():
            return None
    vertices = np.stack([vertex[axis] for axis in "xyz"], axis=1).astype(np.float64)
    faces, _ = triangulate(vertices, list(polygons))
    corners = np.concatenate([np.zeros(0, np.int64), *polygons]).astype(np.int64)
    colors = None
    if {"red", "green", "blue"} <= {*vertex.dtype.names}:
        colors = np.stack([vertex[name] for name in ("red", "green", "blue")], axis=1)
    return trimesh.Trimesh(vertices, corners[faces], vertex_colors=colors, process=False)


def _strips(rows: np.ndarray) -> list[np.ndarray]:
    """Cut triangle strips, which -1 separates, into triangles; every second one is turned round."""
    triangles = []
    for row in rows:
        for strip in np.split(row, np.flatnonzero(np.asarray(row) < 0)):
            strip = np.asarray(strip)[np.asarray(strip) >= 0]
            for i in range(len(strip) - 2):
                a, b, c = strip[i : i + 3]
                if len({a, b, c}) == 3:
                    triangles.append(np.array([a, b, c] if i % 2 == 0 else [b, a, c]))
    return triangles


def _read_off(text: str) -> trimesh.Trimesh:
    """Read an OFF file with polygons of any number of corners. Raises ValueError."""
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines or not lines[0][0].upper().endswith("OFF"):
        raise ValueError("expected an OFF file, got something else")
    lines = [lines[0][1:], *lines[1:]] if len(lines[0]) > 1 else lines[1:]
    number, count = (int(value) for value in lines[0][:2])
    if number + count + 1 > len(lines):
        raise ValueError(f"the file ends before its {number} vertices and {count} faces")
    vertices = np.array([line[:3] for line in lines[1 : number + 1]], dtype=np.float64).reshape(-1, 3)
    rows = lines[number + 1 : number + 1 + count]
    polygons = [np.array(row[1 : 1 + int(row[0])], dtype=np.int64) for row in rows]
    faces, _ = triangulate(vertices, polygons)
    corners = np.concatenate([np.zeros(0, np.int64), *polygons]).astype(np.int64)
    return trimesh.Trimesh(vertices, corners[faces], process=False)

"""Check what a glTF file says of itself, before a loader believes it.

A loader takes memory for as many numbers as a file claims, and passes over extensions that it does not know: of a mesh
compressed in another way it would read zeros.
"""

import json
import struct
from importlib.util import find_spec
from typing import Any

# extensions that change no vertex and no triangle, or that the loader knows
HARMLESS = ("KHR_materials_", "KHR_texture_", "EXT_texture_", "KHR_lights_", "EXT_lights_", "KHR_xmp", "KHR_audio")
KNOWN = ("KHR_mesh_quantization", "KHR_animation_pointer", "KHR_node_visibility", "KHR_materials_variants")
DRACO = "KHR_draco_mesh_compression"
# extensions that put triangles where a reader without them finds none, whether the file calls them required or not
HIDING = ("EXT_meshopt_compression", "KHR_meshopt_compression", "EXT_mesh_gpu_instancing")
BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}  # of a number, by componentType
NUMBERS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
MAX_PLACED = 1_000_000  # meshes that a scene may place
MAX_CORNERS = 300_000_000  # of triangles that a scene may place
MAX_DEPTH = 200  # nodes inside one another


def check_gltf(data: bytes, is_binary: bool) -> None:
    """Check a .glb or .gltf file.

    Raises:
        ValueError: it is not glTF 2; it needs an extension that is not known here; or it claims more than it holds.
    """
    tree = _header(data) if is_binary else json.loads(data)
    if not isinstance(tree, dict):
        raise ValueError("expected an object in the JSON of the file")
    version = str(_table(tree, "asset").get("version", ""))
    if not version.startswith("2"):
        raise ValueError(f"expected glTF 2, got version {version or 'none'}")
    _check_extensions(tree)
    _check_accessors(tree, len(data))
    _check_scene(tree)


def _header(data: bytes) -> Any:
    """The JSON of a .glb file."""
    if len(data) < 20 or data[:4] != b"glTF":
        raise ValueError("expected a GLB file, got something else")
    version, _, length, kind = struct.unpack_from("<IIII", data, 4)
    if version != 2:
        raise ValueError(f"expected a GLB of version 2, got {version}")
    if kind != 0x4E4F534A or 20 + length > len(data):
        raise ValueError("the file is truncated, or its first chunk is not JSON")
    return json.loads(data[20 : 20 + length])


def _check_extensions(tree: dict) -> None:
    used, required = ({*_list(tree, key)} for key in ("extensionsUsed", "extensionsRequired"))
    for name in sorted(required | (used & {*HIDING})):
        if name == DRACO:
            if find_spec("DracoPy") is None:
                raise ValueError(f"the mesh is compressed ({DRACO}): pip install DracoPy, or save it without")
        elif name in HIDING or not (name in KNOWN or str(name).startswith(HARMLESS)):
            raise ValueError(f"the file needs the extension {name}, which is not known here: save it without")


def _check_accessors(tree: dict, size: int) -> None:
    """Check that no accessor claims more bytes than the whole file has; `buffers` of a .gltf lie in it, in base64."""
    is_decoded = {
        accessor
        for mesh in _list(tree, "meshes")
        for primitive in _list(mesh, "primitives")
        if DRACO in _table(primitive, "extensions")
        for accessor in (*_table(primitive, "attributes").values(), primitive.get("indices"))
    }
    for number, accessor in enumerate(_list(tree, "accessors")):
        each = BYTES.get(accessor.get("componentType"), 0) * NUMBERS.get(accessor.get("type"), 0)
        count = accessor.get("count", -1)
        if not isinstance(count, int) or count < 0 or not each:
            raise ValueError(f"accessor {number} is damaged")
        if number in is_decoded:
            each = 0.01  # compressed
        external = any("uri" in buffer and not buffer["uri"].startswith("data:") for buffer in _list(tree, "buffers"))
        if count * each > size and not external:
            raise ValueError(f"accessor {number} claims {count} items, more than the file holds")


def _check_scene(tree: dict) -> None:
    """Check that the nodes form trees, and place no more meshes than a computer can hold."""
    nodes, placed, corners = _list(tree, "nodes"), 0, 0
    corners_of = [_corners(tree, mesh) for mesh in _list(tree, "meshes")]
    children = {child for node in nodes for child in _list(node, "children")}
    waiting = [(index, 1) for index in range(len(nodes)) if index not in children]
    while waiting:
        index, depth = waiting.pop()
        placed += 1
        if placed > MAX_PLACED or depth > MAX_DEPTH:
            raise ValueError(f"the scene places more than {MAX_PLACED} nodes, or one inside another {MAX_DEPTH} times")
        if not isinstance(index, int) or not 0 <= index < len(nodes):
            raise ValueError(f"the scene names node {index} of {len(nodes)}")
        mesh = nodes[index].get("mesh")
        corners += corners_of[mesh] if isinstance(mesh, int) and 0 <= mesh < len(corners_of) else 0
        if corners > MAX_CORNERS:
            raise ValueError(f"the scene places more than {MAX_CORNERS // 3:,} triangles")
        waiting += [(child, depth + 1) for child in _list(nodes[index], "children")]


def _corners(tree: dict, mesh: dict) -> int:
    """The corners of all triangles of a mesh."""
    accessors, total = _list(tree, "accessors"), 0
    for primitive in _list(mesh, "primitives"):
        number = primitive.get("indices", _table(primitive, "attributes").get("POSITION", -1))
        total += accessors[number]["count"] if isinstance(number, int) and 0 <= number < len(accessors) else 0
    return total


def _list(tree: dict, key: str) -> list:
    value = tree.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"expected a list of {key}")
    return value


def _table(tree: dict, key: str) -> dict:
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"expected a table of {key}")
    return value

"""Mesh files as people have them: what no reader read rightly before, and files that claim what they do not hold."""

import base64
import io
import json
import struct

import numpy as np
import pytest
import trimesh

from d3ds2.meshes.mesh_file import MeshFileError, read_mesh
from d3ds2.meshes.mesh_parts import read_parts
from d3ds2.meshes.polygons import triangulate

C_SHAPE = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 3), (3, 3), (3, 4), (0, 4)]  # area 8, around a notch


def area(parts) -> float:
    return sum(part.area for part in parts)


def glb(tree: dict, binary: bytes = b"", version: int = 2) -> bytes:
    """Write a GLB file."""
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    if binary:
        binary += b"\0" * (-len(binary) % 4)
        chunks += struct.pack("<II", len(binary), 0x004E4942) + binary
    return b"glTF" + struct.pack("<II", version, 12 + len(chunks)) + chunks


def box_tree() -> tuple[dict, bytes]:
    """Return the JSON and the binary chunk of a box in glTF."""
    data = trimesh.creation.box().export(file_type="glb")
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + length]), data[28 + length :]


# --- polygons


@pytest.mark.parametrize("turn", range(len(C_SHAPE)))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concave_polygons_keep_their_area(turn, axis):
    outline = np.roll(C_SHAPE, turn, axis=0)
    points = np.insert(outline, axis, 0.5, axis=1).astype(float)
    faces, owner = triangulate(points, [np.arange(8), np.arange(8)[::-1]])
    corners = points[np.concatenate([np.arange(8), np.arange(8)[::-1]])[faces]]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2
    for polygon, sign in ((0, 1), (1, -1)):
        own = normals[owner == polygon]
        assert np.linalg.norm(own, axis=1).sum() == pytest.approx(8)
        assert own.sum(0)[axis] == pytest.approx(-sign * 8 if axis == 1 else sign * 8)  # inserting y mirrors


def test_concave_quads_and_convex_polygons():
    arrow = np.array([(0, 0, 0), (2, 1, 0), (0, 2, 0), (1, 1, 0)], float)
    for turn in range(4):
        order = np.roll(np.arange(4), turn)
        faces, _ = triangulate(arrow, [order])
        corners = arrow[order[faces]]
        sides = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2]
        assert (sides > 0).all() and sides.sum() / 2 == pytest.approx(1.0)
    around = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = np.stack([np.cos(around), np.sin(around), 0 * around], 1)
    faces, owner = triangulate(ring, [np.arange(12), np.array([0, 1]), np.array([3, 4, 5])])
    assert len(faces) == 11 and (owner == 0).sum() == 10 and (owner == 2).sum() == 1
    with pytest.raises(ValueError, match="expected faces of vertices 0 to 11, got 0 to 12"):
        triangulate(ring, [np.array([0, 1, 12])])


def wall(kind: str) -> bytes:
    """Write the letter C, extruded by 1, with polygons of eight corners: area 34."""
    n = len(C_SHAPE)
    vertices = [(x, y, z) for z in (0, 1) for x, y in C_SHAPE]
    polygons = [list(range(n))[::-1], list(range(n, 2 * n))]
    polygons += [[i, (i + 1) % n, n + (i + 1) % n, n + i] for i in range(n)]
    if kind == ".obj":
        lines = [f"v {x} {y} {z}" for x, y, z in vertices]
        lines += ["f " + " ".join(str(i + 1 - (2 * n + 1) * (i % 2)) for i in p) for p in polygons]  # some count back
    elif kind == ".off":
        lines = ["OFF # a letter", f"{2 * n} {len(polygons)} 0", *(f"{x} {y} {z}" for x, y, z in vertices)]
        lines += [f"{len(p)} " + " ".join(map(str, p)) for p in polygons]
    else:
        lines = ["ply", "format ascii 1.0", f"element vertex {2 * n}", *(f"property float {a}" for a in "xyz")]
        lines += [f"element face {len(polygons)}", "property list uchar int vertex_indices", "end_header"]
        lines += [f"{x} {y} {z}" for x, y, z in vertices] + [f"{len(p)} " + " ".join(map(str, p)) for p in polygons]
    return "\n".join([*lines, ""]).encode()


@pytest.mark.parametrize("kind", [".obj", ".off", ".ply"])
def test_a_doorway_stays_open(kind):
    (part,) = read_parts(wall(kind), kind)
    assert part.area == pytest.approx(34)
    mesh = read_mesh(io.BytesIO(wall(kind)), kind)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces).volume == pytest.approx(8)


# --- texts, strips and trailing bytes


def test_tabs_and_a_byte_order_mark_in_an_obj():
    text = trimesh.creation.box().export(file_type="obj")
    lines = "".join(line + "\n" for line in text.splitlines() if line[:2] in ("v ", "f "))
    for data in (lines.replace(" ", "\t"), "\ufeff" + lines, lines.replace("\n", "\r\n")):
        assert area(read_parts(data.encode(), ".obj")) == pytest.approx(6)


def test_triangle_strips_in_a_ply():
    lines = ["ply", "format ascii 1.0", "element vertex 4", *(f"property float {a}" for a in "xyz")]
    lines += ["element tristrips 1", "property list int int vertex_indices", "end_header"]
    lines += ["0 0 0", "1 0 0", "0 1 0", "0 0 1", "10 0 2 1 3 -1 2 3 0 1 -1"]
    (part,) = read_parts("\n".join([*lines, ""]).encode(), ".ply")
    assert len(part.faces) == 4


def test_bytes_after_an_stl():
    data = trimesh.creation.box().export(file_type="stl")
    assert area(read_parts(data + b"made by a program" * 3, ".stl")) == pytest.approx(6)


def test_colors_of_a_ply_with_polygons_stay():
    lines = ["ply", "format ascii 1.0", "element vertex 4", *(f"property float {a}" for a in "xyz")]
    lines += [*(f"property uchar {c}" for c in ("red", "green", "blue")), "element face 1"]
    lines += ["property list uchar int vertex_indices", "end_header"]
    lines += [f"{x} {y} 0 200 10 {60 * x}" for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))] + ["4 0 1 2 3", ""]
    (part,) = read_parts("\n".join(lines).encode(), ".ply")
    assert part.visual.kind == "vertex" and (part.visual.vertex_colors[:, :2] == (200, 10)).all()


@pytest.mark.parametrize("kind", [".obj", ".off", ".ply", ".glb"])
def test_a_vertex_of_no_face_does_not_count(kind):
    sphere = trimesh.creation.icosphere(1)
    stray = trimesh.Trimesh([*sphere.vertices, (100, 0, 0)], sphere.faces, process=False)
    mesh = read_mesh(io.BytesIO(trimesh.util.decode_text(stray.export(file_type=kind[1:])).encode()
                                if kind in (".obj", ".off") else stray.export(file_type=kind[1:])), kind)  # fmt: skip
    assert np.abs(mesh.vertices).max() < 1.01 and len(mesh.vertices) == len(sphere.vertices)


# --- glTF


def test_placed_parts_and_embedded_buffers_are_read():
    tree, binary = box_tree()
    tree["nodes"] = [{"mesh": 0, "translation": [3 * i, 0, 0]} for i in range(3)]
    tree["scenes"], tree["scene"] = [{"nodes": [0, 1, 2]}], 0
    assert area(read_parts(glb(tree, binary), ".glb")) == pytest.approx(18)
    tree["buffers"][0]["uri"] = "data:application/octet-stream;base64," + base64.b64encode(binary).decode()
    assert area(read_parts(json.dumps(tree).encode(), ".gltf")) == pytest.approx(18)


def test_a_draco_mesh_is_decoded_or_refused(monkeypatch):
    pytest.importorskip("DracoPy")
    torus = trimesh.creation.torus(1.0, 0.3)
    data = trimesh.exchange.gltf.export_glb(torus.scene(), extension_draco=True)
    assert b"KHR_draco_mesh_compression" in data
    assert area(read_parts(data, ".glb")) == pytest.approx(torus.area, rel=1e-2)
    monkeypatch.setattr("d3ds2.meshes.gltf_check.find_spec", lambda name: None)
    with pytest.raises(MeshFileError, match=r"compressed \(KHR_draco_mesh_compression\): pip install DracoPy"):
        read_mesh(io.BytesIO(data), ".glb")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extensionsUsed": ["EXT_mesh_gpu_instancing"]}, "needs the extension EXT_mesh_gpu_instancing"),
        ({"extensionsUsed": ["EXT_meshopt_compression"]}, "needs the extension EXT_meshopt_compression"),
        ({"extensionsRequired": ["VENDOR_new_shape"]}, "needs the extension VENDOR_new_shape"),
        ({"asset": {"version": "1.0"}}, "expected glTF 2, got version 1.0"),
        ({"asset": 3}, "expected a table of asset"),
        ({"accessors": [{"componentType": 5126, "type": "VEC3", "count": 10**12}]}, "claims 1000000000000 items"),
        ({"nodes": [{"children": [0]}]}, None),
        ({"nodes": [{"mesh": 0, "children": [i + 1] * 9} for i in range(8)] + [{"mesh": 0}]}, "places more than"),
    ],
)
def test_what_a_gltf_claims_is_checked_first(changes, message):
    tree, binary = box_tree()
    with pytest.raises(MeshFileError, match=message):
        read_mesh(io.BytesIO(glb(tree | changes, binary)), ".glb")


def test_materials_and_unknown_optional_extensions_are_read():
    tree, binary = box_tree()
    tree["extensionsUsed"] = ["KHR_materials_clearcoat", "VENDOR_thumbnail"]
    tree["extensionsRequired"] = ["KHR_materials_clearcoat", "KHR_texture_transform"]
    assert area(read_parts(glb(tree, binary), ".glb")) == pytest.approx(6)


@pytest.mark.parametrize("version", [1, 99])
def test_other_versions_of_glb(version):
    with pytest.raises(MeshFileError, match=f"expected a GLB of version 2, got {version}"):
        read_mesh(io.BytesIO(glb({}, version=version)), ".glb")


@pytest.mark.parametrize("kind", [".glb", ".gltf", ".obj", ".ply", ".stl", ".off"])
def test_damaged_files_are_an_error_of_one_line(kind):
    rng = np.random.default_rng(0)
    box = trimesh.creation.box().export(file_type="glb" if kind == ".gltf" else kind[1:])
    whole = box.encode() if isinstance(box, str) else box
    if kind == ".gltf":
        whole = b"[" * 100_000
    damaged = [whole[: len(whole) // 2], whole[:5], b"", b"\0" * 200, rng.bytes(300)]
    for _ in range(20):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        try:
            mesh = read_mesh(io.BytesIO(data), kind)
            assert len(mesh.faces) and mesh.faces.max() < len(mesh.vertices) and np.isfinite(mesh.vertices).all()
        except MeshFileError as error:
            assert str(error) and "\n" not in str(error)


def test_a_gltf_without_its_files_says_so():
    tree, _ = box_tree()
    tree["buffers"][0]["uri"] = "box.bin"
    with pytest.raises(MeshFileError, match="names other files, which did not come with it: give the GLB"):
        read_mesh(io.BytesIO(json.dumps(tree).encode()), ".gltf")

"""Any mesh file, and any MESH in a socket, ends in a sound mesh or in one clear error."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest
import trimesh
from hypothesis import given
from hypothesis import strategies as st

from d3ds2.meshes.mesh import Mesh
from d3ds2.meshes.mesh_file import MeshFileError, read_mesh
from d3ds2.meshes.mesh_to_sdf import mesh_to_sdf, normalize_mesh
from tests.support.bounded import outcome
from tests.support.hostile import as_json, changed_tree, damaged
from training.data.mesh_entry import MeshEntry
from training.data.meshes import read_mesh as read_training_mesh

KINDS = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
PLAIN = {  # by name: a whole file of a box, area 6
    ".off": b"OFF\n8 6 0\n" + b"".join(b"%d %d %d\n" % (x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1))
    + b"4 0 1 3 2\n4 4 6 7 5\n4 0 4 5 1\n4 2 3 7 6\n4 0 2 6 4\n4 1 5 7 3\n",
}  # fmt: skip
TEXTS = (
    b"v nan inf 1e999\n",
    b"f 1 2 3 4 5\n",
    b"f 0 0 0\n",
    b"f -1 -99999999999999999999 1\n",
    b"f 1//",
    b"\xff\xfe\0",
)


def files() -> dict[str, bytes]:
    """Return whole files of a box by their kind; text and binary, triangles and polygons."""
    box = trimesh.creation.box()
    made = {kind: box.export(file_type=kind[1:]) for kind in (".glb", ".obj", ".ply", ".stl")}
    made = {kind: data.encode() if isinstance(data, str) else data for kind, data in made.items()}
    made[".gltf"] = as_json(embedded(*glb_parts(made[".glb"])))
    return made | PLAIN


def glb_parts(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[12:16], "little")
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def embedded(tree: dict, binary: bytes) -> dict:
    import base64

    uri = "data:application/octet-stream;base64," + base64.b64encode(binary).decode()
    return tree | {"buffers": [{"byteLength": len(binary), "uri": uri}]}


def as_glb(tree: object, binary: bytes) -> bytes:
    text = as_json(tree)
    text += b" " * (-len(text) % 4)
    chunks = len(text).to_bytes(4, "little") + b"JSON" + text + len(binary).to_bytes(4, "little") + b"BIN\0" + binary
    return b"glTF" + (2).to_bytes(4, "little") + (12 + len(chunks)).to_bytes(4, "little") + chunks


WHOLE = files()


@st.composite
def mesh_files(draw):
    """Draw the kind of a file and its bytes, with a fault."""
    kind = draw(st.sampled_from(KINDS))
    if kind in (".glb", ".gltf") and draw(st.integers(0, 3)):
        tree, binary = glb_parts(WHOLE[".glb"])
        tree = draw(changed_tree(tree if kind == ".glb" else embedded(tree, binary)))
        return kind, as_glb(tree, binary) if kind == ".glb" else as_json(tree)
    data = WHOLE[kind]
    if kind in (".obj", ".off", ".ply") and draw(st.booleans()):
        lines = data.splitlines(keepends=True)
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(TEXTS)))
        return kind, b"".join(lines)
    return kind, draw(damaged(data))


def assert_sound(mesh: Mesh) -> None:
    assert len(mesh.faces) and mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)
    assert np.isfinite(mesh.vertices).all() and np.isfinite(mesh.normals).all()
    assert mesh.vertices.shape == mesh.normals.shape and mesh.faces.shape[1] == 3


@given(drawn=mesh_files())
def test_any_file_is_a_mesh_or_one_error(drawn):
    kind, data = drawn
    mesh = outcome(lambda: read_mesh(io.BytesIO(data), kind), MeshFileError)
    if not isinstance(mesh, MeshFileError):
        assert_sound(mesh)


@given(drawn=mesh_files())
def test_any_file_is_a_training_mesh_or_one_error(tmp_path_factory, drawn):
    kind, data = drawn
    path = tmp_path_factory.getbasetemp() / f"case{kind}"
    path.write_bytes(data)
    entry = MeshEntry("case", path, "train", "folder", {}, None, None, None, None)
    found = outcome(lambda: read_training_mesh(entry), ValueError)
    if not isinstance(found, ValueError):
        vertices, faces, _ = found
        assert len(faces) and faces.min() >= 0 and faces.max() < len(vertices) and np.isfinite(vertices).all()


@given(data=st.data())
def test_any_npz_is_a_training_mesh_or_one_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "case.npz"
    box, file = trimesh.creation.box(), io.BytesIO()
    np.savez_compressed(file, v=np.asarray(box.vertices, np.float32), f=np.asarray(box.faces, np.int32))
    path.write_bytes(data.draw(damaged(file.getvalue())))
    entry = MeshEntry("case", path, "train", "folder", {}, None, None, None, None)
    found = outcome(lambda: read_training_mesh(entry), ValueError)
    if not isinstance(found, ValueError):
        vertices, faces, _ = found
        assert len(faces) and faces.max() < len(vertices) and np.isfinite(vertices).all()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read(kind):
    mesh = outcome(lambda: read_mesh(io.BytesIO(WHOLE[kind]), kind))
    assert_sound(mesh)
    assert trimesh.Trimesh(mesh.vertices, mesh.faces).area == pytest.approx(6)


def npz(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(shape: tuple[int, ...], kind: str, content: bytes) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": kind})
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"v": npy((10**12, 3), "<f4", b""), "f": npy((1, 3), "<i4", bytes(12))},
            "claims (1000000000000, 3) of",
        ),
        ({"v": npy((70 << 20,), "|u1", bytes(70 << 20))}, "bytes unpack to 73,"),
        ({"v": b"no array"}, "cannot be read as one"),
    ],
)
def test_an_npz_that_claims_more_than_it_holds(tmp_path, entries, message):
    path = tmp_path / "a.npz"
    path.write_bytes(npz(entries))
    entry = MeshEntry("a", path, "train", "folder", {}, None, None, None, None)
    found = outcome(lambda: read_training_mesh(entry), ValueError, resident=200 << 20)
    assert message in str(found)


ROWS = st.sampled_from(((1, 2, 3), (3, 3), (0, 3), (4, 2), (4, 1), (4,), (4, 3, 1), (4, 3)))
DTYPES = st.sampled_from(("float32", "float64", "float16", "int64", "int32", "uint8", "bool", "complex64", "object"))
NUMBERS = st.sampled_from((0, 1, 2, 3, -1, 4, 2**31, 2**62, np.nan, np.inf, 1e38, 1e-45, 1e300))


@st.composite
def arrays(draw):
    """Draw an array of any shape and dtype, with hostile numbers in it."""
    shape, dtype = draw(ROWS), draw(DTYPES)
    numbers = [draw(NUMBERS) for _ in range(int(np.prod(shape)))]
    with np.errstate(all="ignore"):
        return np.array(numbers, dtype=np.float64).astype(dtype, casting="unsafe").reshape(shape)


@given(vertices=arrays(), faces=arrays(), shell=st.sampled_from((0.55, 0.0, 4.0, 1e9, np.nan)))
def test_any_arrays_are_a_solid_or_one_error(vertices, faces, shell):
    sdf = outcome(lambda: mesh_to_sdf(normalize_mesh(vertices), faces, 32, shell=shell), ValueError, TypeError)
    assert not isinstance(sdf, TypeError)
    if not isinstance(sdf, ValueError):
        assert np.isfinite(sdf.values).all() and sdf.block_coords.max(initial=0) < 4


def without_view(tree: dict) -> dict:
    """Let an accessor claim 100 million zeros: glTF needs no buffer for them."""
    accessor = tree["accessors"][0] | {"count": 10**8}
    accessor.pop("bufferView")
    return tree | {"accessors": [accessor, *tree["accessors"][1:]]}


def with_first(tree: dict, key: str, **values) -> dict:
    return tree | {key: [tree[key][0] | values, *tree[key][1:]]}


SPARSE = {"count": 10**9, "indices": {"bufferView": 0, "componentType": 5125}, "values": {"bufferView": 0}}
TREES = {
    "no buffer view": without_view,
    "sparse": lambda tree: with_first(tree, "accessors", sparse=SPARSE),
    "stride": lambda tree: with_first(tree, "bufferViews", byteStride=10**9),
    "stride of 1": lambda tree: with_first(tree, "bufferViews", byteStride=1),
    "view beyond its buffer": lambda tree: with_first(tree, "bufferViews", byteLength=10**12),
    "offset": lambda tree: with_first(tree, "bufferViews", byteOffset=10**12),
    "negative offset": lambda tree: with_first(tree, "bufferViews", byteOffset=-8),
    "no such view": lambda tree: with_first(tree, "accessors", bufferView=99),
    "matrix of NaN": lambda tree: tree | {"nodes": [{"mesh": 0, "matrix": [float("nan")] * 16}]},
    "huge scale": lambda tree: tree | {"nodes": [{"mesh": 0, "scale": [1e300] * 3}]},
    "quaternion of zeros": lambda tree: tree | {"nodes": [{"mesh": 0, "rotation": [0, 0, 0, 0]}]},
    "deep": lambda tree: tree | {"extras": deep(5000)},
}


def deep(levels: int) -> list:
    tree: list = []
    for _ in range(levels):
        tree = [tree]
    return tree


@pytest.mark.parametrize("name", TREES)
def test_a_gltf_that_claims_more_than_it_holds(name):
    tree, binary = glb_parts(WHOLE[".glb"])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # for writing it
    data = as_glb(TREES[name](tree), binary)
    sys.setrecursionlimit(limit)
    mesh = outcome(lambda: read_mesh(io.BytesIO(data), ".glb"), MeshFileError, resident=300 << 20)
    if not isinstance(mesh, MeshFileError):  # a reader may pass over it
        assert_sound(mesh)
    else:
        assert str(mesh).startswith("the glb file is damaged or holds no mesh (")


BOX = glb_parts(WHOLE[".glb"])[0]
PLY = b"ply\nformat %b 1.0\nelement vertex %d\nproperty float x\nproperty float y\nproperty float z\nelement face %d\n"
PLY += b"property list uchar int vertex_indices\nend_header\n"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (".ply", PLY % (b"ascii", 10**12, 10**12) + b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"),
        (".ply", PLY % (b"binary_little_endian", 10**12, 1) + bytes(100)),
        (".ply", PLY % (b"binary_big_endian", 3, 10**9) + bytes(100)),
        (".ply", PLY.replace(b"uchar int", b"uint int") % (b"binary_little_endian", 3, 1) + bytes(36) + b"\xff" * 4),
        (".stl", bytes(80) + b"\xff" * 4 + bytes(50)),
        (".off", b"OFF\n1000000000000 1000000000000 0\n0 0 0\n"),
        (".off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n1000000000000 0 1 2\n"),
        (".obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 1000000000000\n"),
        (".gltf", as_json({**BOX, "buffers": [{"uri": "data:;base64,@@@", "byteLength": 9}]})),
        (
            ".gltf",
            as_json({**BOX, "buffers": [{"uri": "file:///etc/passwd", "byteLength": 9}]}),
        ),
    ],
)
def test_a_file_that_claims_more_than_it_holds(kind, data):
    error = outcome(lambda: read_mesh(io.BytesIO(data), kind), MeshFileError, resident=300 << 20)
    assert isinstance(error, MeshFileError) or len(error.faces) == 1

"""Any value in a widget and anything in a socket ends in a right result or in one clear error without tags."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bounded import outcome
from tests.support.comfy_stand_ins import MESH, PaddedMESH
from tests.support.hostile import FLOATS, INTS, NAMES
from tests.support.tiny_model import picture, write_model

TAGS = "<img src=x onerror=alert(1)>"
BOX = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
BOX_FACES = torch.tensor(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4],
     [1, 5, 7], [1, 7, 3]]
)  # fmt: skip


@pytest.fixture(scope="module")
def comfy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfy")
    (folder / "output").mkdir()
    # few voxels are occupied, so that a result is quick
    write_model(folder / "models" / "direct3d_s2" / "random", structure_vae={"threshold": 0.65})
    return folder


@pytest.fixture(scope="module")
def model(comfy):
    return comfy.run("LoadD3DS2Model", model="random")[0]


@pytest.fixture(scope="module")
def structure(comfy, model):
    """Three voxels: quick to sample and to decode."""
    sockets = comfy.module("nodes.comfy.sockets")
    return sockets.Structure(torch.tensor([[0, 2, 3, 4], [0, 3, 3, 4], [0, 3, 4, 4]], dtype=torch.int32), 8, 1)


@pytest.fixture(scope="module")
def latent(comfy, model, structure):
    return comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(), seed=5)[0]


def run(comfy, node_id, **inputs):
    """Run a node; its texts and its error have no tags, and what it cannot write it leaves no trace of."""
    comfy.texts.clear()
    before = {path for path in (comfy.folder / "output").rglob("*") if path.is_file()}
    result = outcome(lambda: comfy.run(node_id, **inputs), ValueError)
    assert all("<" not in text and ">" not in text and text.isprintable() for text, _ in comfy.texts)
    if isinstance(result, ValueError):
        assert "<" not in str(result) and ">" not in str(result)
        assert {path for path in (comfy.folder / "output").rglob("*") if path.is_file()} == before
    return result


SIGMAS = st.sampled_from(
    ([], [1.0], [1.0, 0.0], [1.0, 0.5, 0.0], [14.6, 7.0, 0.0], [1.0, float("nan"), 0.0], [0.0, 1.0], [[1.0], [0.0]])
)
SAMPLING = {
    "seed": INTS,
    "steps": st.one_of(INTS, st.just(1)),
    "guidance_scale": st.one_of(FLOATS, INTS),
    "sampler": st.one_of(st.just("heun"), NAMES),
    "guidance_start": FLOATS,
    "guidance_end": FLOATS,
    "guidance_rescale": FLOATS,
    "sigmas": SIGMAS.map(torch.tensor),
}


@st.composite
def one_wrong(draw, values, right):
    """Draw inputs of which one, or none, is not the right one."""
    name = draw(st.sampled_from(("", *values)))
    return dict(right) if not name else {**right, name: draw(values[name])}


@given(inputs=one_wrong(SAMPLING, {"seed": 3, "steps": 1, "guidance_scale": 1.0}))
def test_any_sampling_of_latents(comfy, model, structure, inputs):
    result = run(comfy, "D3DS2SSADiTSample", model=model, structure=structure, image=picture(), **inputs)
    if not isinstance(result, ValueError):
        assert result[0].latents.shape == (3, 16) and 0 <= inputs["steps"] <= 10_000


@given(inputs=one_wrong(SAMPLING, {"seed": 3, "steps": 1, "guidance_scale": 1.0}))
def test_any_sampling_of_structures(comfy, model, inputs):
    result = run(comfy, "D3DS2SparseStructureSample", model=model, image=picture(), **inputs)
    if not isinstance(result, ValueError):
        assert len(result[0].coords) and 0 <= inputs["steps"] <= 10_000


DECODING = {"level": FLOATS, "memory_budget_gb": FLOATS, "min_component": st.one_of(FLOATS, INTS)}


@given(inputs=one_wrong(DECODING, {"level": 0.0, "memory_budget_gb": 0.0, "min_component": 0.0}))
def test_any_decoding(comfy, model, latent, inputs):
    result = run(comfy, "D3DS2VAEDecodeSDF", model=model, latent=latent, **inputs)
    if not isinstance(result, ValueError):
        assert result[0].vertices.isfinite().all() and result[0].vertices.abs().max() <= 1


EXPORT = {
    "filename_prefix": NAMES,
    "target_faces": INTS,
    "size": st.one_of(FLOATS, INTS),
    "up_axis": NAMES,
    "format": st.one_of(st.sampled_from(("stl", "obj", "ply", "3mf")), NAMES),
}


@given(inputs=one_wrong(EXPORT, {"filename_prefix": "right"}), kind=st.sampled_from(("glb", "stl", "3mf")))
def test_any_export(comfy, inputs, kind):
    mesh = MESH(BOX[None], BOX_FACES[None])
    result = run(comfy, "D3DS2MeshExport", mesh=mesh, **{"format": kind, **inputs})
    if not isinstance(result, ValueError):
        for path in result[0]:
            file = comfy.folder / "output" / path
            assert file.stat().st_size > 100 and not file.name.startswith(".")
            assert file.resolve().is_relative_to((comfy.folder / "output").resolve())


@given(name=NAMES)
def test_any_model_name(comfy, name):
    node = comfy.nodes["LoadD3DS2Model"]
    said = outcome(lambda: node.validate_inputs(name))
    assert isinstance(said, str) and "<" not in said and said.isprintable()
    assert isinstance(outcome(lambda: node.fingerprint_inputs(name, "auto"), ValueError), ValueError)
    assert isinstance(run(comfy, "LoadD3DS2Model", model=name), ValueError)


ROWS = st.sampled_from(((1, 8, 3), (1, 12, 3), (1, 4, 2), (1, 4, 1), (2, 5, 3), (0, 3, 3), (1, 0, 3), (8, 3), (3,), ()))
DTYPES = st.sampled_from((torch.float32, torch.int64, torch.int32, torch.float64, torch.bool, torch.complex64))
NUMBERS = st.sampled_from((0, 1, 2, 3, 7, -1, 8, 2**31, 2**62, float("nan"), float("inf"), 1e38, 1e300))


@st.composite
def tensors(draw, right):
    """Draw the right tensor, one with a wrong number, or any other; rarely no tensor."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.sampled_from((None, [[1, 2, 3]], "text")))
    if kind <= 2:
        numbers = torch.tensor([float(draw(NUMBERS)) for _ in range(4)], dtype=torch.float64)
        shape = draw(ROWS)
        return numbers.repeat(30)[: int(np.prod(shape))].reshape(shape).to(draw(DTYPES))
    made = right[None].clone()
    if kind <= 4:
        numbers = NUMBERS if made.is_floating_point() else st.sampled_from((-1, 8, 2**31, 2**62))
        made = made.double() if made.is_floating_point() else made
        made[0, draw(st.integers(0, made.shape[1] - 1)), draw(st.integers(0, made.shape[2] - 1))] = draw(numbers)
    return made


COUNTS = st.sampled_from((None, *(torch.tensor(count) for count in ([8], [0], [-1], [10**9], []))))


@given(vertices=tensors(BOX), faces=tensors(BOX_FACES), counts=st.tuples(COUNTS, COUNTS), normals=tensors(BOX))
def test_any_mesh_in_a_socket(comfy, model, vertices, faces, counts, normals):
    mesh = PaddedMESH(vertices, faces, None, *counts)
    mesh.normals = normals
    result = run(comfy, "D3DS2MeshExport", mesh=mesh, filename_prefix="socket/a", format="stl")
    if not isinstance(result, ValueError):
        assert (comfy.folder / "output" / result[0][0]).stat().st_size > 84
    result = run(comfy, "D3DS2StructureFromMesh", model=model, mesh=mesh)
    if not isinstance(result, ValueError):
        assert len(result[0].coords)


IMAGES = ((1, 8, 9, 3), (1, 8, 9, 4), (2, 8, 9, 3), (1, 1, 1, 3), (1, 8, 9), (0, 8, 9, 3), (1, 8, 9, 1))
MASKS = (None, (1, 8, 9), (8, 9), (2, 8, 9), (1, 3, 3), (9,), (0, 8, 9), (1, 1, 8, 9))


@given(data=st.data())
def test_any_picture_in_a_socket(comfy, data):
    shape = data.draw(st.sampled_from(IMAGES))
    fill = data.draw(st.sampled_from((0.0, 0.5, 1.0, -5.0, 1e30, float("nan"), float("inf"))))
    image = torch.full(shape, fill)
    if image.numel() and image.ndim == 4:
        image[:, 2:6, 3:7] = 0.3
    mask_shape = data.draw(st.sampled_from(MASKS))
    mask = None if mask_shape is None else torch.full(mask_shape, fill)
    method = data.draw(st.sampled_from(("auto", "mask", "alpha", "plain", "model")))
    ratio = data.draw(st.sampled_from((0.0, 0.9, float("nan"), -1.0, 2.0)))
    result = run(comfy, "D3DS2RemoveBackground", image=image, mask=mask, method=method, foreground_ratio=ratio)
    if not isinstance(result, ValueError):
        assert result[0].isfinite().all() and result[0].shape[-1] == 4 and result[1].shape == result[0].shape[:3]


PICTURES = {"sides": INTS, "azimuth": FLOATS, "elevation": FLOATS, "resolution": INTS}


@given(inputs=one_wrong(PICTURES, {"sides": 1, "azimuth": 0.0, "elevation": 15.0, "resolution": 16}))
def test_any_view_of_a_mesh(comfy, inputs):
    result = run(comfy, "D3DS2MeshPictures", mesh=MESH(BOX[None], BOX_FACES[None]), **inputs)
    if not isinstance(result, ValueError):
        assert all(part.isfinite().all() and len(part) == inputs["sides"] for part in result.args)


TEXTURES = (None, "text", *(torch.full(shape, 0.5) for shape in ((1, 4, 4, 3), (2, 4, 4, 3), (4, 4, 3), (1, 0, 4, 3))))
STRANGE = (torch.full((1, 4, 4, 3), float("nan")), torch.ones(1, 4, 4), torch.ones(1))
LOOKS = {
    "uvs": tensors(BOX[:, :2]),
    "vertex_colors": tensors(BOX),
    "texture": st.sampled_from((*TEXTURES, *STRANGE)),
}


@given(looks=st.fixed_dictionaries(LOOKS), kind=st.sampled_from(("glb", "obj", "ply", "stl", "3mf")))
def test_any_look_of_a_mesh(comfy, looks, kind):
    mesh = PaddedMESH(BOX[None], BOX_FACES[None])
    for name, value in looks.items():
        setattr(mesh, name, value)
    result = run(comfy, "D3DS2MeshExport", mesh=mesh, filename_prefix="look/a", format=kind)
    if not isinstance(result, ValueError):
        assert (comfy.folder / "output" / result[0][0]).stat().st_size > 84

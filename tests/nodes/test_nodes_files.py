"""Remove Background and Mesh Export over stand-ins of ComfyUI: pictures in, files out."""

import json
import re
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from tests.support.comfy_stand_ins import MESH
from tests.support.tiny_model import picture

OBJECT = picture()[0, :, :, 3] > 0.5  # (80, 96)


@pytest.fixture
def no_rembg(comfy, monkeypatch):
    monkeypatch.setattr(comfy.module("d3ds2.images.foreground"), "find_spec", lambda name: None)


class BackgroundRemovalModel:
    """Stands for core's model: returns a mask of each image, 1 on the object."""

    def __init__(self, mask):
        self.mask, self.shapes = mask, []

    def encode_image(self, image):
        self.shapes.append(tuple(image.shape))
        return self.mask[None]


def scene() -> torch.Tensor:
    """Return the object in front of a background that is not plain, as IMAGE (1, 80, 96, 3)."""
    background = torch.from_numpy(np.random.default_rng(0).random((80, 96, 3), np.float32))
    return torch.where(OBJECT[..., None], picture()[0, ..., :3], background)[None]


def overlap(mask: torch.Tensor) -> float:
    found = mask[0] > 0.5
    return ((found & OBJECT).sum() / (found | OBJECT).sum()).item()


def test_every_method_finds_the_object(comfy, no_rembg):
    def run(**inputs):
        return comfy.run("D3DS2RemoveBackground", foreground_ratio=0.0, **inputs).args

    mask = OBJECT[None].float()
    model = BackgroundRemovalModel(OBJECT.float())
    for inputs in (
        {"image": scene(), "mask": mask},
        {"image": scene(), "mask": 1 - mask},
        {"image": scene(), "mask": 1 - mask, "invert_mask": "yes", "method": "mask"},
        {"image": scene(), "mask": 1 - mask, "invert_mask": True},  # of a workflow that was saved with a switch
        {"image": scene(), "mask": mask, "invert_mask": "no"},
        {"image": scene(), "mask": mask[0]},
        {"image": picture()},
        {"image": picture(), "method": "alpha", "mask": 1 - mask},
        {"image": scene(), "background_removal": model},
        {"image": picture(mode="RGB"), "method": "model", "background_removal": model},
        {"image": picture(mode="RGB")},
        {"image": picture(mode="RGB"), "method": "plain", "mask": 1 - mask},
    ):
        image, found = run(**inputs)
        assert image.shape == (1, 80, 96, 4) and found.shape == (1, 80, 96) and found.dtype == torch.float32
        assert overlap(found) > 0.97, inputs.keys()
        assert torch.equal(image[..., 3], found)
    assert model.shapes == [(1, 80, 96, 3)] * 2


def test_auto_uses_the_first_method_that_is_available(comfy, monkeypatch, no_rembg):
    used = []

    def run(**inputs):
        comfy.texts.clear()
        comfy.run("D3DS2RemoveBackground", **inputs)
        used.append(comfy.texts[0][0].split(": ")[1])

    mask, model = OBJECT[None].float(), BackgroundRemovalModel(OBJECT.float())
    run(image=picture(), mask=mask, background_removal=model)
    run(image=picture(), background_removal=model)
    run(image=picture(mode="RGB"), background_removal=model)
    run(image=picture(mode="RGB"))
    foreground = comfy.module("d3ds2.images.foreground")
    reasons = iter([None, "it was deleted meanwhile"])
    monkeypatch.setattr(foreground, "why_rembg_cannot_run", lambda name=None: next(reasons))
    with pytest.raises(ValueError, match=r"it was deleted meanwhile.*Connect a mask"):
        run(image=scene())
    assert comfy.texts[0][0] == "picture 1/1: rembg"
    assert used == ["mask", "alpha", "model", "plain"]


def test_the_status_says_what_was_changed(comfy, no_rembg):
    mask = OBJECT[None].float()
    mask[0, 1, 1] = 1.0
    comfy.texts.clear()
    comfy.run("D3DS2RemoveBackground", image=scene(), mask=1 - mask)
    lines = [text for text, _ in comfy.texts]
    assert lines[0] == "picture 1/1: mask, inverted: it was 1 around the object"
    assert lines[1].endswith("left out of the object: 1 of 7680 pixels, faint or far from it")


def test_methods_that_cannot_run_are_refused_before_the_prompt_runs(comfy, no_rembg):
    validate = comfy.nodes["D3DS2RemoveBackground"].validate_inputs
    assert validate(invert_mask="auto", method="auto") is True and validate(invert_mask=None, method=None) is True
    message = validate(invert_mask="auto", method="rembg")
    assert message.startswith('method is `rembg`, but rembg is not installed: pip install "rembg[cpu]". Connect a mask')
    assert "expected a method of auto, mask" in validate(invert_mask="auto", method="magic")
    assert "expected invert_mask of auto" in validate(invert_mask="maybe", method="auto")


def test_the_empty_mask_of_load_image_is_ignored(comfy, no_rembg):
    empty = torch.zeros(1, 64, 64)
    found = comfy.run("D3DS2RemoveBackground", image=picture(mode="RGB"), mask=empty, invert_mask="yes")[1]
    assert 0.1 < (found > 0.5).float().mean() < 0.9
    with pytest.raises(ValueError, match=r"the mask is empty.*with invert_mask `auto` or `yes`"):
        comfy.run("D3DS2RemoveBackground", image=picture(mode="RGB"), mask=empty, method="mask")
    with pytest.raises(ValueError, match=r"no foreground in the image: the mask is empty.*Connect a mask that is 1"):
        comfy.run("D3DS2RemoveBackground", image=picture(), mask=torch.zeros(1, 80, 96))


def test_an_error_says_what_a_method_needs(comfy, no_rembg):
    for inputs, message in (
        ({"method": "mask"}, "no mask is connected: connect one, or choose `auto`"),
        ({"method": "model"}, "no background removal model is connected"),
        ({"method": "alpha"}, r"has no alpha channel.*Connect an IMAGE with four channels"),
        ({"method": "plain"}, r"background is not plain.*Connect a mask, or ComfyUI's"),
        ({"method": "rembg"}, r"rembg is not installed.*Connect a mask, or ComfyUI's"),
        ({}, r"background is not plain.*Connect a mask, or ComfyUI's"),
        ({"mask": torch.ones(2, 80, 96)}, "expected 1 mask or 1, one for each image, got 2"),
        ({"mask": torch.ones(1, 1, 80, 96)}, "expected a MASK"),
    ):
        with pytest.raises(ValueError, match=message):
            comfy.run("D3DS2RemoveBackground", image=scene(), **inputs)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_object_is_centred_at_its_ratio(comfy, ratio):
    images, masks = comfy.run("D3DS2RemoveBackground", image=picture(2), foreground_ratio=ratio).args
    assert images.shape == (2, 96, 96, 4)
    for mask in masks:
        rows, columns = (np.flatnonzero((mask > 0.02).any(axis)) for axis in (1, 0))
        extents = [rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1]
        assert abs(max(extents) - 96 * ratio) <= 2
        for first, last in ((rows[0], rows[-1]), (columns[0], columns[-1])):
            assert abs(first + last - 95) <= 2


def test_a_batch_is_cut_out_picture_by_picture(comfy):
    images = picture(3)
    together = comfy.run("D3DS2RemoveBackground", image=images)
    for i in range(3):
        alone = comfy.run("D3DS2RemoveBackground", image=images[i : i + 1])
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])
    shared = comfy.run("D3DS2RemoveBackground", image=images, mask=OBJECT[None].float(), foreground_ratio=0.0)
    assert torch.equal(shared[1], OBJECT.float().expand(3, -1, -1))


# --- Mesh Export


def ball(count: int = 1, subdivisions: int = 3) -> MESH:
    """Return `count` balls, each higher along Y than the one before."""
    sphere = trimesh.creation.icosphere(subdivisions)
    vertices = torch.from_numpy(np.asarray(sphere.vertices, np.float32))
    stretch = torch.tensor([[0.4, 0.5 + 0.1 * i, 0.3] for i in range(count)])
    return MESH(vertices * stretch[:, None], torch.from_numpy(np.asarray(sphere.faces)).expand(count, -1, -1))


def read_glb(path) -> dict:
    """Return the JSON of a GLB, after checking its header."""
    data = path.read_bytes()
    magic, version, length, size, kind = struct.unpack("<4sIII4s", data[:20])
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
    return json.loads(data[20 : 20 + size])


@pytest.mark.parametrize("extension", ["glb", "obj", "ply", "stl"])
def test_files_hold_the_mesh(comfy, extension):
    mesh = ball()
    out = comfy.run("D3DS2MeshExport", mesh=mesh, filename_prefix=f"{extension}/ball", format=extension)
    path, file = out[0][0], out[1][0]
    assert path == f"{extension}/ball_00001_.{extension}" and file.format == extension
    assert out.ui["3d"] == [{"filename": f"ball_00001_.{extension}", "subfolder": extension, "type": "output"}]
    assert file.source == str(comfy.folder / "output" / path)
    loaded = trimesh.load(file.source, force="mesh")
    assert len(loaded.faces) == mesh.faces.shape[1] and loaded.is_watertight and loaded.volume > 0
    metre = 1000 if extension == "stl" else 1
    np.testing.assert_allclose(loaded.extents / metre, [0.8, 1.0, 0.6], atol=1e-5)


@pytest.mark.parametrize("extension", ["glb", "obj", "ply", "stl"])
def test_files_can_be_read_back_as_meshes(comfy, extension):
    mesh = ball()
    out = comfy.run("D3DS2MeshExport", mesh=mesh, filename_prefix=f"back/{extension}", format=extension)
    again = comfy.run("D3DS2MeshExport", mesh=out[1][0], filename_prefix=f"again/{extension}", target_faces=300)
    loaded = trimesh.load(again[1][0].source, force="mesh")
    assert len(loaded.faces) <= 300 and loaded.is_watertight and loaded.volume > 0
    np.testing.assert_allclose(loaded.extents, [0.8, 1.0, 0.6], atol=0.05)


def test_files_that_hold_no_mesh_are_named(comfy, tmp_path):
    for name, content, message in (
        ("a.glb", b"no mesh", "the glb file is damaged or holds no mesh"),
        ("a.obj", b"v 0 0 0\n", "the obj file (is damaged or holds no mesh|holds no triangles)"),
        ("a.stl", b"", "the stl file (is damaged or holds no mesh|holds no triangles)"),
        ("a.fbx", b"", "expected a mesh file of .glb, .obj, .ply, .stl, .gltf, .off, got '.fbx'"),
    ):
        (tmp_path / name).write_bytes(content)
        file = type(comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="any")[1][0])(
            str(tmp_path / name), name[2:]
        )
        with pytest.raises(ValueError, match=message):
            comfy.run("D3DS2MeshExport", mesh=file)


def test_a_batch_is_numbered_and_nothing_is_overwritten(comfy):
    first = comfy.run("D3DS2MeshExport", mesh=ball(2), filename_prefix="many/a")
    second = comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="many/a")
    assert first[0] == ["many/a_00001_.glb", "many/a_00002_.glb"] and second[0] == ["many/a_00003_.glb"]
    widths = [trimesh.load(file.source, force="mesh").extents[0] for file in first[1]]
    np.testing.assert_allclose(widths, [0.8, 0.8 / 1.2], atol=1e-5)
    assert sorted(file.name for file in (comfy.folder / "output" / "many").iterdir()) == [
        "a_00001_.glb",
        "a_00002_.glb",
        "a_00003_.glb",
    ]
    assert comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="flat")[0] == ["flat_00001_.glb"]


def test_status_goes_to_one_tab_and_holds_no_tags(comfy):
    comfy.texts.clear()
    comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="tags/<img src=x onerror=alert(1)>")
    text, node = comfy.texts[-1]
    assert "‹img src=x onerror=alert(1)›_00001_.glb" in text and "<" not in text and node == "7"
    assert set(comfy.clients) == {"tab"}


def test_prompts_at_once_get_a_file_each(comfy):
    def export(index):
        return comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="at_once/a", format="stl")[0][0]

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(export, range(40)))
    files = list((comfy.folder / "output" / "at_once").iterdir())
    assert len(set(paths)) == len(files) == 40 and {f"at_once/{file.name}" for file in files} == set(paths)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("../x", "points outside"),
        ("a/", "no file name"),
        ("a/.x", "hidden file"),
        ("a\0b", "NUL character"),
        ("3d/con/x", "con for a device"),
    ],
)
def test_a_prefix_that_cannot_work_is_refused_before_the_prompt_runs(comfy, prefix, message):
    node = comfy.nodes["D3DS2MeshExport"]
    assert message in node.validate_inputs(prefix) and node.validate_inputs("3d/d3ds2") is True
    with pytest.raises(ValueError, match=message):
        comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix=prefix)


def test_target_faces_simplifies_a_closed_mesh(comfy):
    out = comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="fewer", target_faces=200)
    loaded = trimesh.load(out[1][0].source, force="mesh")
    assert 100 < len(loaded.faces) <= 200 and loaded.is_watertight
    np.testing.assert_allclose(loaded.extents, [0.8, 1.0, 0.6], atol=0.05)
    with pytest.raises(ValueError, match="target_faces of at least 4, got 3"):
        comfy.run("D3DS2MeshExport", mesh=ball(), target_faces=3)


def test_z_up_turns_the_mesh_without_mirroring_it(comfy):
    out = comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="z_up", up_axis="Z")
    loaded = trimesh.load(out[1][0].source, force="mesh")
    np.testing.assert_allclose(loaded.extents, [0.8, 0.6, 1.0], atol=1e-5)
    assert loaded.volume > 0  # turned, not mirrored
    normals = np.asarray(loaded.vertex_normals)
    assert ((normals * loaded.vertices).sum(1) > 0).all()


@pytest.mark.parametrize(("extension", "unit"), [("glb", 1), ("obj", 1), ("ply", 1), ("stl", 1000)])
def test_the_longest_edge_is_the_size_in_the_unit_of_the_file(comfy, extension, unit):
    def extents(**inputs):
        out = comfy.run("D3DS2MeshExport", mesh=wide, filename_prefix="size/a", format=extension, **inputs)
        return trimesh.load(out[1][0].source, force="mesh").extents

    wide = ball()
    wide.vertices = wide.vertices * 7
    np.testing.assert_allclose(extents(size=0.08), unit * np.array([0.064, 0.08, 0.048]), rtol=1e-4)
    np.testing.assert_allclose(extents(size=0.08, up_axis="Z"), unit * np.array([0.064, 0.048, 0.08]), rtol=1e-4)
    np.testing.assert_allclose(extents(size=0.0), [5.6, 7.0, 4.2], rtol=1e-4)
    np.testing.assert_allclose(extents(), unit * np.array([0.8, 1.0, 0.6]), rtol=1e-4)


def test_the_workflow_travels_in_the_glb(comfy):
    prompt, workflow = {"1": {"class_type": "LoadD3DS2Model"}}, {"nodes": [{"id": 1, "title": "été"}]}

    def run(prefix, **inputs):
        out = comfy.run(
            "D3DS2MeshExport", mesh=ball(), filename_prefix=prefix, prompt=prompt, workflow=workflow, **inputs
        )
        return read_glb(comfy.folder / "output" / out[0][0])["asset"]

    extras = run("workflow")["extras"]
    assert json.loads(extras["workflow"]) == workflow and json.loads(extras["prompt"]) == prompt
    assert not run("without", embed_workflow=False).get("extras")
    comfy.arguments.disable_metadata = True
    assert not run("disabled").get("extras")
    comfy.arguments.disable_metadata = False


def test_dates_are_filled_in_by_comfyui(comfy, monkeypatch):
    prefixes = []
    paths = comfy.modules["folder_paths"]
    original = paths.get_save_image_path
    monkeypatch.setattr(paths, "get_save_image_path", lambda p, o: (prefixes.append(p), original("dated/x", o))[1])
    comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="%year%/%month%/x")
    assert prefixes == ["%year%/%month%/x"]


def test_pictures_survive_the_round_trip_through_pillow(comfy):
    module = comfy.module("nodes.comfy.pictures")
    levels = torch.arange(256).float() / 255
    image = levels.view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(module.to_images(module.to_pictures(image)), image)
    assert module.to_masks(torch.tensor([[[2.0, -1.0, float("nan")]]]))[0].tobytes() == bytes([255, 0, 0])
    assert isinstance(module.to_pictures(image)[0], Image.Image)


def painted(count: int = 1) -> MESH:
    """Return balls with UVs, a texture and colours, as newer versions of ComfyUI carry them."""
    mesh = ball(count)
    V = mesh.vertices.shape[1]
    mesh.uvs = torch.rand(count, V, 2, generator=torch.manual_seed(0))
    mesh.texture = torch.rand(count, 8, 8, 3, generator=torch.manual_seed(1))
    mesh.vertex_colors = torch.rand(count, V, 3, generator=torch.manual_seed(2))
    return mesh


def test_uvs_textures_and_colours_travel_into_the_file(comfy):
    mesh = painted(2)
    out = comfy.run("D3DS2MeshExport", mesh=mesh, filename_prefix="painted/a")
    for i, file in enumerate(out[1]):
        visual = next(iter(trimesh.load(file.source, process=False).geometry.values())).visual
        np.testing.assert_allclose(visual.uv * [1, -1] + [0, 1], mesh.uvs[i], atol=1e-6)
        np.testing.assert_allclose(visual.vertex_attributes["color"][:, :3] / 255, mesh.vertex_colors[i], atol=1 / 255)
        pixels = np.asarray(visual.material.baseColorTexture.convert("RGB")) / 255
        np.testing.assert_allclose(pixels, mesh.texture[i], atol=1 / 255)
    assert out.ui["status_text"] == ("1,280 faces in a_00001_.glb", "1,280 faces in a_00002_.glb")


def test_the_status_says_what_a_file_does_not_hold(comfy):
    def text(**inputs):
        return comfy.run("D3DS2MeshExport", mesh=painted(), filename_prefix="lost/a", **inputs).ui["status_text"][0]

    assert text(format="stl").endswith("a_00001_.stl; without UVs, textures and vertex colours: stl holds none")
    assert text(format="ply").endswith("; without UVs and textures: ply holds none")
    assert text(target_faces=300).endswith("; without UVs, textures and vertex colours: it was simplified")
    assert text(target_faces=5000).endswith(".glb")


def test_uvs_of_too_few_vertices_are_refused(comfy):
    mesh = painted()
    mesh.uvs = mesh.uvs[:, :9]
    with pytest.raises(ValueError, match="expected uvs of all 642 vertices, got 9"):
        comfy.run("D3DS2MeshExport", mesh=mesh)


def test_a_3mf_is_in_millimetres(comfy):
    out = comfy.run("D3DS2MeshExport", mesh=ball(), filename_prefix="print/a", format="3mf", size=0.05, up_axis="Z")
    with zipfile.ZipFile(out[1][0].source) as package:
        model = package.read("3D/3dmodel.model").decode()
    found = np.array(re.findall(r'<vertex x="(.+?)" y="(.+?)" z="(.+?)"/>', model), float)
    np.testing.assert_allclose(np.ptp(found, axis=0), [40, 30, 50], atol=1e-3)
    assert 'unit="millimeter"' in model

"""Wrong use of the nodes: the node raises an error that says what to do, before any long work."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3ds2.storage.model_folder import save_settings
from tests.support.comfy_stand_ins import MESH
from tests.support.tiny_model import SAMPLING, make_networks, picture, write_model

TRIANGLES = torch.tensor([[[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]]])
TETRAHEDRON = MESH(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]), TRIANGLES)


@pytest.fixture
def copied(comfy):
    """A copy of the model folder, which the test may damage."""
    folder = comfy.folder / "models" / "direct3d_s2" / "damaged"
    shutil.copytree(folder.parent / "random", folder)
    yield folder
    shutil.rmtree(folder)


def test_a_missing_model_is_named_with_its_place(comfy):
    for call in (comfy.nodes["LoadD3DS2Model"].fingerprint_inputs, comfy.nodes["LoadD3DS2Model"].execute):
        with pytest.raises(ValueError, match=r"no model folder 'none': expected .*direct3d_s2/none with config.json"):
            call("none", "auto")
    message = comfy.nodes["LoadD3DS2Model"].validate_inputs("none")
    assert "press R" in message and "choose one of tiny, random" in message
    assert comfy.nodes["LoadD3DS2Model"].validate_inputs("random") is True
    assert comfy.nodes["LoadD3DS2Model"].validate_inputs(None) is True  # another node will give the name
    assert comfy.nodes["D3DS2MeshExport"].validate_inputs(None) is True


@pytest.mark.parametrize("name", ["../random", "../../models/direct3d_s2/random", "/etc", "", "..", "."])
def test_a_model_name_cannot_point_elsewhere(comfy, name):
    assert "no model folder" in comfy.nodes["LoadD3DS2Model"].validate_inputs(name)


def test_a_truncated_file_is_named(comfy, copied):
    file = copied / "latent_dit.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged file .*latent_dit.safetensors.*Copy or convert the model 'damaged'"):
        comfy.run("LoadD3DS2Model", model="damaged")


def test_a_missing_file_and_an_unknown_tensor_are_named(comfy, copied):
    tensors = load_file(copied / "sdf_vae.safetensors")
    save_file(tensors | {"surplus": torch.zeros(1)}, copied / "sdf_vae.safetensors")
    with pytest.raises(ValueError, match=r"sdf_vae.safetensors has unexpected tensors: surplus.*Copy or convert"):
        comfy.run("LoadD3DS2Model", model="damaged")
    (copied / "structure_vae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing file .*structure_vae.safetensors.*Copy or convert"):
        comfy.run("LoadD3DS2Model", model="damaged")
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged file .*config.json.*choose another one"):
        comfy.run("LoadD3DS2Model", model="damaged")


def test_a_picture_without_an_object_leads_to_the_node_that_helps(comfy, model, structure):
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 64, 64, 3), np.float32))
    for node_id, inputs in (("D3DS2SparseStructureSample", {}), ("D3DS2SSADiTSample", {"structure": structure})):
        with pytest.raises(ValueError, match=r"background is not plain.*Put the node Remove Background before"):
            comfy.run(node_id, model=model, image=noise, **inputs)
        with pytest.raises(ValueError, match=r"sample 2 of 2: no foreground.*plain background.*Remove Background"):
            white = torch.ones(1, 80, 96, 3)
            comfy.run(node_id, model=model, image=torch.cat([picture(mode="RGB"), white]), **inputs)


@pytest.mark.parametrize("shape", [(80, 96, 3), (1, 80, 96, 1), (0, 80, 96, 3), (1, 80, 0, 3)])
def test_a_tensor_that_is_no_image_is_refused(comfy, model, shape):
    with pytest.raises(ValueError, match="expected an IMAGE"):
        comfy.run("D3DS2SparseStructureSample", model=model, image=torch.zeros(shape))


def test_a_structure_of_another_resolution_is_refused(comfy, model, structure):
    other = type(structure)(structure.coords, 16, 1)
    with pytest.raises(ValueError, match=r"wrong structure.*it is 16³.*'random' samples at 8³.*the same model"):
        comfy.run("D3DS2SSADiTSample", model=model, structure=other, image=picture())


def test_a_latent_of_another_model_is_refused(comfy, model, structure):
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    folder = comfy.folder / "models" / "direct3d_s2" / "other"
    write_model(folder, sdf_vae={"latents_scale": 0.7})
    other = comfy.run("LoadD3DS2Model", model="other")[0]
    with pytest.raises(ValueError, match="wrong latent for this model: the latent was made with 'random'"):
        comfy.run("D3DS2VAEDecodeSDF", model=other, latent=latent)
    write_model(folder)
    save_settings(folder, "renamed", SAMPLING)
    other = comfy.run("LoadD3DS2Model", model="other")[0]
    with pytest.raises(ValueError, match=r"made with 'random', but the model is 'renamed'\. Connect the model that"):
        comfy.run("D3DS2VAEDecodeSDF", model=other, latent=latent)


def test_too_many_tokens_and_too_little_memory_are_refused_early(comfy, model, structure, monkeypatch):
    count = len(structure.coords)
    with pytest.raises(ValueError, match=f"has {count} tokens, more than max_tokens {count - 1}: .* raise max_tokens"):
        comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(), max_tokens=count - 1)
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(), max_tokens=count)[0]
    with pytest.raises(ValueError, match=r"memory_budget_gb 0.001 is too small.*needs at least .* GB.*to 0"):
        comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent, memory_budget_gb=0.001)
    monkeypatch.setattr(comfy, "total_memory", 1 << 20)
    for node_id, inputs, message in (
        ("D3DS2SSADiTSample", {"structure": structure, "image": picture()}, f"sampling {count} tokens needs about"),
        ("D3DS2SparseStructureSample", {"image": picture()}, "sampling a structure needs about"),
        ("D3DS2VAEEncodeMesh", {"mesh": TETRAHEDRON}, r"encoding [\d,]+ voxels needs about"),
        ("D3DS2VAEDecodeSDF", {"latent": latent}, f"decoding {count} tokens needs about"),
    ):
        with pytest.raises(ValueError, match=rf"{message} .* GB, but cpu has 0.0 GB: .*(model|GB)"):
            comfy.run(node_id, model=model, **inputs)


def test_a_budget_is_refused_before_the_latent_is_sampled(comfy, model, structure):
    def sample(budget, latent=("12", 0), kind="D3DS2VAEDecodeSDF"):
        decode = {"class_type": kind, "inputs": {"latent": list(latent), "memory_budget_gb": budget}}
        prompt = {"12": {"class_type": "D3DS2SSADiTSample", "inputs": {}}, "13": decode}
        comfy.run("D3DS2SSADiTSample", node="12", prompt=prompt, model=model, structure=structure, image=picture())

    comfy.texts.clear()
    with pytest.raises(ValueError, match=r"memory_budget_gb 0.001 is too small.*needs at least .* GB.*to 0"):
        sample(0.001)
    assert not comfy.texts  # nothing was sampled
    for others in ({"latent": ("7", 0)}, {"kind": "Other"}, {"budget": ["3", 0]}, {"budget": 0.0}, {"budget": 1.0}):
        sample(**{"budget": 0.001} | others)


def test_no_mesh_is_refused_in_words(comfy, model):
    """Load 3D gives None while its file is `none`."""
    for node_id, inputs in (
        ("D3DS2VAEEncodeMesh", {"model": model}),
        ("D3DS2StructureFromMesh", {"model": model}),
        ("D3DS2MeshExport", {}),
    ):
        with pytest.raises(ValueError, match=r"no mesh came in: Load 3D gives none while .* Choose a file there"):
            comfy.run(node_id, mesh=None, **inputs)


def test_a_result_that_is_empty_or_not_finite_is_reported(comfy):
    networks = make_networks()
    networks["structure_vae"].decoder.out_conv.bias.fill_(-1e4)
    folder = comfy.folder / "models" / "direct3d_s2" / "empty"
    write_model(folder)
    save_file(networks["structure_vae"].state_dict(), folder / "structure_vae.safetensors")
    model = comfy.run("LoadD3DS2Model", model="empty")[0]
    model.pipeline.stages[0].sdf_vae.decoder.out_layer.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="structure of image came out empty; try another seed"):
        comfy.run("D3DS2SparseStructureSample", model=model, image=picture())
    with pytest.raises(ValueError, match="sample 1 of 2: the structure of image came out empty"):
        comfy.run("D3DS2SparseStructureSample", model=model, image=picture(2))
    latent = comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=TETRAHEDRON)[0]
    with pytest.raises(ValueError, match="not finite on cpu; try float32"):
        comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        (torch.zeros(1, 0, 3), TRIANGLES[:, :0], "mesh 1 of 1 is empty: it has 0 vertices and 0 faces"),
        (TETRAHEDRON.vertices, TRIANGLES[:, :0], "is empty: it has 4 vertices and 0 faces"),
        (TETRAHEDRON.vertices, TRIANGLES + 1, r"damaged: expected face indices in \[0, 4\), got 1 to 4"),
        (TETRAHEDRON.vertices * float("inf"), TRIANGLES, "damaged: expected finite vertices, got 4 that are not"),
        (TETRAHEDRON.vertices, TRIANGLES[..., :2], r"damaged: expected integer faces \(F, 3\)"),
        (TETRAHEDRON.vertices, TRIANGLES[..., :1], r"damaged: expected integer faces \(F, 3\)"),
        (TETRAHEDRON.vertices[..., :2], TRIANGLES, r"damaged: expected vertices \(V, 3\)"),
        (TETRAHEDRON.vertices[:0], TRIANGLES[:0], "the batch of meshes is empty"),
    ],
)
def test_damaged_meshes_are_refused(comfy, model, vertices, faces, message):
    mesh = MESH(vertices, faces)
    for node_id in ("D3DS2VAEEncodeMesh", "D3DS2StructureFromMesh"):
        with pytest.raises(ValueError, match=message):
            comfy.run(node_id, model=model, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        comfy.run("D3DS2MeshExport", mesh=mesh)


def test_a_mesh_outside_the_box_is_refused_unless_it_is_fitted(comfy, model):
    large = MESH(TETRAHEDRON.vertices * 3, TRIANGLES)
    with pytest.raises(ValueError, match=r"beyond the box \[-0.5, 0.5\]³, to 3: turn on fit, or scale the mesh down"):
        comfy.run("D3DS2StructureFromMesh", model=model, mesh=large, fit=False)
    assert comfy.run("D3DS2StructureFromMesh", model=model, mesh=large)[0].batch_size == 1


@pytest.mark.parametrize(
    "prefix",
    ["../../x", "..", "../x", "a/../../x", "/tmp/x", "3d/../../../x", "..\\..\\x", "C/../../x", "../output2/x"],
)
def test_a_prefix_cannot_point_outside_the_output_folder(comfy, prefix):
    before = set(comfy.folder.rglob("*"))
    with pytest.raises(ValueError, match=r"points outside the output folder .*output: use one inside it, such as 3d/n"):
        comfy.run("D3DS2MeshExport", mesh=TETRAHEDRON, filename_prefix=prefix)
    assert set(comfy.folder.rglob("*")) == before


@pytest.mark.parametrize("prefix", ["", ".", "3d/", " ", "3d/.", "3d/.."])
def test_a_prefix_needs_a_name(comfy, prefix):
    with pytest.raises(ValueError, match=r"has no file name|points outside"):
        comfy.run("D3DS2MeshExport", mesh=TETRAHEDRON, filename_prefix=prefix)


def test_a_folder_that_cannot_be_created_is_named(comfy):
    (comfy.folder / "output" / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot create the folder for .*taken/x: .*--output-directory"):
        comfy.run("D3DS2MeshExport", mesh=TETRAHEDRON, filename_prefix="taken/x")


def test_a_read_only_folder_is_named(comfy, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: "/proc")  # read-only for root as well
    with pytest.raises(ValueError, match=r"cannot write /proc/self/x_00001_.glb: .*Make the folder writable"):
        comfy.run("D3DS2MeshExport", mesh=TETRAHEDRON, filename_prefix="self/x")


def test_a_write_that_fails_leaves_nothing(comfy, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot write .*x_00001_.glb: No space left.*free up disk space"):
        comfy.run("D3DS2MeshExport", mesh=TETRAHEDRON, filename_prefix="full/x")
    assert not list((comfy.folder / "output" / "full").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vertices": None}, r"expected a MESH with vertices \(batch, rows, 3\), got NoneType"),
        ({"faces": TRIANGLES[0]}, r"expected a MESH with faces \(batch, rows, 3\), got torch.int64 \(4, 3\)"),
        ({"vertices": TETRAHEDRON.vertices.to(torch.complex64)}, "got torch.complex64"),
        ({"faces": TRIANGLES.repeat(2, 1, 1)}, "expected faces of all 1 meshes, got 2"),
        ({"vertex_counts": torch.tensor([])}, "expected counts of the vertices of all 1 meshes, got 0"),
        ({"vertex_counts": torch.tensor([5])}, "expected at most 4 vertices in mesh 1, got 5"),
        ({"face_counts": torch.tensor([-1])}, "expected at most 4 faces in mesh 1, got -1"),
        ({"face_counts": torch.tensor([0])}, "mesh 1 of 1 is empty: it has 4 vertices and 0 faces"),
        ({"vertices": TETRAHEDRON.vertices.double() * 1e300}, "expected vertices up to 1e.30, got|that are not"),
    ],
)
def test_a_socket_that_is_no_mesh_is_refused(comfy, changes, message):
    mesh = MESH(TETRAHEDRON.vertices, TRIANGLES)
    for name, value in changes.items():
        setattr(mesh, name, value)
    with pytest.raises(ValueError, match=message):
        comfy.run("D3DS2MeshExport", mesh=mesh)


def test_normals_that_are_not_finite_are_computed(comfy):
    mesh = MESH(TETRAHEDRON.vertices, TRIANGLES)
    mesh.normals = torch.full((1, 4, 3), float("nan"))
    file = comfy.run("D3DS2MeshExport", mesh=mesh, filename_prefix="normals", format="obj")[1][0]
    text = Path(file.source).read_text()
    assert text.count("vn ") == 4 and "nan" not in text


def test_latents_and_structures_that_do_not_fit_are_refused(comfy, structure, latent):
    with pytest.raises(ValueError, match=r"expected latents \(N, E\) of the structure's \d+ voxels, got \(3, 16\)"):
        type(latent)(latent.latents[:3], structure, latent.made_for)
    for coords, batch_size, message in (
        (structure.coords.long(), 1, r"expected coords \(N, 4\) int32, got torch.int64"),
        (structure.coords[:, :3], 1, r"expected coords \(N, 4\) int32"),
        (structure.coords[:0], 1, "expected voxels of each of 1 samples"),
        (structure.coords, 2, "expected voxels of each of 2 samples"),
        (structure.coords[:0], 0, "expected voxels of each of 0 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            type(structure)(coords, 8, batch_size)


@pytest.mark.parametrize(
    ("node_id", "inputs", "message"),
    [
        ("D3DS2SSADiTSample", {"steps": 10**12}, "expected 1 to 10000 steps"),
        ("D3DS2SSADiTSample", {"steps": -1}, "expected 1 to 10000 steps"),
        ("D3DS2SSADiTSample", {"guidance_scale": float("nan")}, "expected a guidance_scale up to 1000, got nan"),
        ("D3DS2SSADiTSample", {"guidance_scale": float("inf")}, "expected a guidance_scale up to 1000, got inf"),
        ("D3DS2SparseStructureSample", {"steps": 2**64}, "expected 1 to 10000 steps"),
        ("D3DS2SparseStructureSample", {"guidance_scale": 10**30}, "expected a guidance_scale up to 1000"),
        ("D3DS2VAEDecodeSDF", {"memory_budget_gb": float("inf")}, "expected a memory_budget_gb from 0 to 1,000,000"),
        ("D3DS2VAEDecodeSDF", {"memory_budget_gb": float("nan")}, "expected a memory_budget_gb from 0 to 1,000,000"),
        ("D3DS2VAEDecodeSDF", {"level": float("nan")}, r"expected the level of the surface in \(-1, 1\), got nan"),
        ("D3DS2VAEDecodeSDF", {"min_component": float("nan")}, "expected min_component ›= 0, got nan"),
        ("D3DS2StructureFromMesh", {"shell": float("nan")}, "expected a shell of at least 0.5 voxels, got nan"),
        (
            "D3DS2StructureFromMesh",
            {"shell": 1e9},
            "band of at least 1 . shell = 1000000001.0 up to 64",
        ),
        ("D3DS2MeshExport", {"target_faces": -1}, "target_faces of at least 4, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(comfy, model, structure, latent, node_id, inputs, message):
    sockets = {
        "D3DS2SSADiTSample": {"model": model, "structure": structure, "image": picture()},
        "D3DS2SparseStructureSample": {"model": model, "image": picture()},
        "D3DS2VAEDecodeSDF": {"model": model, "latent": latent},
        "D3DS2StructureFromMesh": {"model": model, "mesh": TETRAHEDRON},
        "D3DS2MeshExport": {"mesh": TETRAHEDRON},
    }[node_id]
    with pytest.raises(ValueError, match=message):
        comfy.run(node_id, **sockets, **inputs)


TAG = "<img src=x onerror=alert(1)>"


def test_no_text_of_an_error_holds_tags(comfy, model, structure, latent, tmp_path):
    """Names and files of others come back in the texts of errors, which the browser shows."""
    named, other = dataclasses.replace(model, name=TAG), type(structure)(structure.coords, 16, 1)
    folder = comfy.folder / "models" / "direct3d_s2" / TAG
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"format": 1, "networks": {TAG: {}}}))
    tree = {"asset": {"version": "2.0"}, "extensionsRequired": [TAG]}
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    file = comfy.module("nodes.comfy.mesh_socket").Types.File3D(str(tmp_path / "a.gltf"), "gltf")
    gone = type(file)(str(tmp_path / TAG), "glb")
    for node_id, inputs in (
        ("LoadD3DS2Model", {"model": TAG}),
        ("LoadD3DS2Model", {"model": f"{TAG}/no"}),
        ("D3DS2SSADiTSample", {"model": named, "structure": other, "image": picture()}),
        ("D3DS2VAEDecodeSDF", {"model": model, "latent": dataclasses.replace(latent, made_for=(TAG, None))}),
        ("D3DS2MeshExport", {"mesh": file}),
        ("D3DS2MeshExport", {"mesh": gone}),
        ("D3DS2MeshExport", {"mesh": TETRAHEDRON, "filename_prefix": f"../{TAG}"}),
    ):
        with pytest.raises(ValueError) as raised:
            comfy.run(node_id, **inputs)
        assert "‹img" in str(raised.value) and "<" not in str(raised.value) and "\n" not in str(raised.value)
    assert "‹img" in comfy.nodes["LoadD3DS2Model"].validate_inputs(f"{TAG}/no")
    assert "‹img" in comfy.nodes["D3DS2MeshExport"].validate_inputs(f"../{TAG}")
    shutil.rmtree(folder)


def test_a_model_name_that_is_too_long_or_a_link_in_a_loop(comfy):
    root = comfy.folder / "models" / "direct3d_s2"
    (root / "loop").symlink_to(root / "loop")
    for name in ("x" * 300, "a\0b", "loop", "loop/x"):
        assert "no model folder" in comfy.nodes["LoadD3DS2Model"].validate_inputs(name)
    (root / "linked").mkdir()
    (root / "linked" / "config.json").write_text("{}")
    (root / "linked" / "sdf_vae.safetensors").symlink_to(root / "nothing")
    assert "config.json" in comfy.nodes["LoadD3DS2Model"].fingerprint_inputs("linked", "auto")
    (root / "loop").unlink()
    shutil.rmtree(root / "linked")

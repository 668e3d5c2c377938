"""Prompts in a real ComfyUI: the shipped workflows, and a graph of all stages with a model of random weights."""

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from d3ds2.pipeline import TINY
from tests.comfy.prompts import DECODE, EXPORT, LATENT, MODEL, PICTURE, STRUCTURE, VIEW, graph
from tests.comfy.server import ComfyServer, PromptRefused, Run
from tests.comfy.workflow_file import BLUEPRINT, WORKFLOWS, nodes_of, read, to_prompt, with_widgets, without_subgraph
from tests.support.tiny_model import draw_object


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> ComfyServer:
    draw_object(mode="RGB").save(comfyui.input / "object.png")
    return comfyui


def files_of(server: ComfyServer, run: Run) -> list[Path]:
    """Return the files that the export nodes wrote in a successful run."""
    assert run.end == "execution_success", run.error
    return [
        server.output / file["subfolder"] / file["filename"]
        for shown in run.outputs.values()
        for file in shown.get("3d", [])
    ]


def geometry(file: Path) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.load(file, force="mesh", process=False)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def asset(file: Path) -> dict:
    """Return the `asset` entry of a GLB file, which says how the mesh was made."""
    data = file.read_bytes()
    assert data[:4] == b"glTF"
    return json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])["asset"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_shipped_workflows_run(server, file):
    """They take two steps; the browser tests take one, and their meshes would be found in the cache."""
    workflow = read(file)
    prompt = to_prompt(workflow, server.get("/object_info"))
    run = server.run(with_widgets(prompt, {"steps": 2}), extra={"workflow": workflow})
    files = files_of(server, run)
    assert len(files) == len(nodes_of(prompt, "D3DS2MeshExport"))
    for glb in files:
        mesh = trimesh.load(glb, force="mesh")
        assert len(mesh.faces) >= 100 and np.isfinite(mesh.vertices).all() and np.abs(mesh.bounds).max() <= 1.001
        assert json.loads(asset(glb)["extras"]["workflow"]) == workflow
    if nodes_of(prompt, "D3DS2VAEDecodeSDF"):
        assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    shown = [output["result"][0] for output in run.outputs.values() if "result" in output]
    assert sorted(shown) == sorted(str(glb.relative_to(server.output)) for glb in files)


def test_the_blueprint_runs(server):
    prompt = to_prompt(without_subgraph(read(BLUEPRINT), "d3ds2_demo_background.png"), server.get("/object_info"))
    run = server.run(with_widgets(prompt, {"steps": 2, "target_faces": 5000}))
    (file,) = files_of(server, run)
    assert 1000 < len(geometry(file)[1]) <= 6000
    (shown,) = [output["result"] for output in run.outputs.values() if "result" in output]
    assert shown[0] == str(file.relative_to(server.output)) and set(shown[1]["position"]) == {"x", "y", "z"}


def test_several_views_make_one_mesh(server):
    """Core batches two pictures; its scheduler gives the times."""
    draw_object(mode="RGB").rotate(90, fillcolor="white").save(server.input / "side.png")
    prompt = graph(seed=7)
    prompt["8"] = {"class_type": "LoadImage", "inputs": {"image": "side.png"}}
    prompt["9"] = {"class_type": "ImageBatch", "inputs": {"image1": [PICTURE, 0], "image2": ["8", 0]}}
    times = {"steps": 4, "sigma_max": 1.0, "sigma_min": 0.05, "rho": 7.0}
    prompt["10"] = {"class_type": "KarrasScheduler", "inputs": times}
    for node in (STRUCTURE, LATENT):
        prompt[node]["inputs"] |= {"image": ["9", 0], "views_of_one_object": True, "sigmas": ["10", 0]}
    run = server.run(prompt)
    assert len(files_of(server, run)) == 1
    for node in (STRUCTURE, LATENT):
        assert [data["max"] for data in run.all("progress") if data["node"] == node][-1] == 4


def test_each_step_is_seen(server):
    run = server.run(graph(seed=40))
    assert run.end == "execution_success", run.error
    for node, steps in ((STRUCTURE, 3), (LATENT, 2)):
        values = [data["value"] for data in run.all("progress") if data["node"] == node]
        assert values[-steps:] == list(range(1, steps + 1))
    assert len(run.all("picture")) >= 5
    texts = dict(run.all("text"))
    assert "tokens" in texts[STRUCTURE] and "tokens" in texts[LATENT] and "faces" in texts[EXPORT]


def test_a_second_run_computes_nothing(server):
    prompt = graph(seed=41)
    first, second = server.run(prompt), server.run(prompt)
    texts = {node: output["status_text"][0] for node, output in first.outputs.items()}
    assert "tokens" in texts[STRUCTURE] and "tokens" in texts[LATENT] and " faces in mesh_" in texts[EXPORT]
    assert second.outputs[EXPORT] == first.outputs[EXPORT]
    assert first.executed >= {STRUCTURE, LATENT, DECODE, EXPORT}
    assert second.end == "execution_success" and not second.executed
    assert files_of(server, second) == files_of(server, first)


@pytest.mark.parametrize(
    ("widget", "value"),
    [("seed", 43), ("level", 0.1), ("up_axis", "Z"), ("target_faces", 200), ("keep_largest", True)],
)
def test_a_b_a_gives_a_again(server, widget, value):
    """Nodes do not change the cached results that they read."""
    runs = [server.run(graph(**changed)) for changed in ({"seed": 42}, {"seed": 42, widget: value}, {"seed": 42})]
    a, b, again = (geometry(files_of(server, run)[0]) for run in runs)
    assert np.array_equal(a[0], again[0]) and np.array_equal(a[1], again[1])
    if widget != "keep_largest":  # the mesh may have only one part
        assert a[0].shape != b[0].shape or not np.array_equal(a[0], b[0])


def test_a_batch_makes_a_file_of_each_picture(server):
    draw_object((120, 80), mode="RGB").resize((96, 80)).save(server.input / "wider.png")
    prompt = graph(seed=7)
    prompt["8"] = {"class_type": "LoadImage", "inputs": {"image": "wider.png"}}
    prompt["9"] = {"class_type": "ImageBatch", "inputs": {"image1": [PICTURE, 0], "image2": ["8", 0]}}
    for node in (STRUCTURE, LATENT):
        prompt[node]["inputs"]["image"] = ["9", 0]
    prompt[VIEW] = {"class_type": "Preview3D", "inputs": {"model_file": [EXPORT, 0]}}
    batch = files_of(server, server.run(prompt))
    assert len(batch) == 2
    alone = files_of(server, server.run(graph(seed=7)))
    assert np.allclose(geometry(batch[0])[0], geometry(alone[0])[0], atol=1e-3)
    assert geometry(batch[0])[0].shape != geometry(batch[1])[0].shape


def test_meshes_pass_to_core_and_back(server):
    """Core makes a mesh of our voxels, we encode and decode it, and core writes the result."""
    prompt = graph(seed=8)
    prompt["8"] = {"class_type": "VoxelToMesh", "inputs": {"voxel": [STRUCTURE, 1], "algorithm": "surface net"}}
    prompt["8"]["inputs"]["threshold"] = 0.5
    encode = {"model": [MODEL, 0], "mesh": ["8", 0], "fit": True, "shell": 0.55}
    prompt["9"] = {"class_type": "D3DS2VAEEncodeMesh", "inputs": encode}
    prompt[DECODE]["inputs"]["latent"] = ["9", 0]
    del prompt[LATENT]
    prompt["10"] = {"class_type": "SaveGLB", "inputs": {"mesh": [DECODE, 0], "filename_prefix": "test/core"}}
    ours, cores = files_of(server, server.run(prompt))
    assert np.array_equal(geometry(ours)[1], geometry(cores)[1])


@pytest.mark.parametrize("extension", ["obj", "ply", "stl"])
def test_other_formats(server, extension):
    (file,) = files_of(server, server.run(graph(seed=42, format=extension)))
    assert file.suffix == f".{extension}" and len(geometry(file)[1]) > 100


def test_a_model_of_extra_model_paths_runs(server):
    assert files_of(server, server.run(graph(model="other", seed=7)))


def test_an_unknown_model_is_refused(server):
    with pytest.raises(PromptRefused, match="no model folder"):
        server.run(graph(model="gone"))


def test_a_damaged_model_says_which_file(server):
    folder = server.models / "direct3d_s2" / "random"
    file = folder / "sdf_vae.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:1000])
    try:
        run = server.run(graph())
    finally:
        file.write_bytes(good)
    assert run.end == "execution_error"
    assert "sdf_vae.safetensors" in run.error and "again" in run.error
    assert server.run(graph()).end == "execution_success"


def test_a_name_outside_the_output_folder_is_refused(server):
    with pytest.raises(PromptRefused, match="points outside the output folder"):
        server.run(graph(filename_prefix="../../stolen"))
    assert not list(server.folder.parent.glob("stolen*"))


@pytest.fixture
def read_only_output(server):
    """Make `output` a link to /sys: permissions do not stop root, but into this folder even root cannot write."""
    away = server.output.rename(server.output.with_name("writable"))
    server.output.symlink_to("/sys")
    yield
    server.output.unlink()
    away.rename(server.output)


@pytest.mark.parametrize(("prefix", "message"), [("mesh", "cannot write"), ("new/mesh", "cannot create the folder")])
def test_an_output_folder_that_cannot_be_written_is_named(server, read_only_output, prefix, message):
    run = server.run(graph(filename_prefix=prefix))
    assert run.end == "execution_error" and run.all("execution_error")[0]["node_id"] == EXPORT
    assert message in run.error and "Make the folder writable" in run.error


def test_a_latent_of_another_model_is_refused(server):
    prompt = graph()
    prompt["8"] = {"class_type": "LoadD3DS2Model", "inputs": {"model": "tiny", "precision": "auto"}}
    prompt[DECODE]["inputs"]["model"] = ["8", 0]
    assert "wrong latent for this model" in server.run(prompt).error


def test_a_memory_budget_that_holds_nothing_is_refused(server):
    run = server.run(graph(memory_budget_gb=0.0001, seed=31))  # no latent of this seed is in the cache
    assert "Raise it, or set it to 0" in run.error
    assert run.all("execution_error")[0]["node_id"] == LATENT  # before it samples anything
    assert not [text for text in run.all("text") if text[0] == LATENT]


def test_the_none_of_load_3d_is_refused_in_words(server):
    load = {"model_file": "none", "image": dict.fromkeys(("image", "mask", "normal"), "object.png"), "width": 64}
    load["image"] |= {"recording": "", "camera_info": {}}
    prompt = {"1": {"class_type": "Load3D", "inputs": load | {"height": 64}}}
    info = server.get("/object_info/Load3D")["Load3D"]
    if "none" not in str(info["input"]["required"]["model_file"]):
        pytest.skip("this Load 3D has no `none`")
    outputs = info["output"]
    place = next((index for index, kind in enumerate(outputs) if kind.startswith("FILE_3D")), None)
    if place is None:
        pytest.skip("this Load 3D gives no file")
    export = graph()[EXPORT]
    export["inputs"]["mesh"] = ["1", place]
    assert "Load 3D gives none while its model_file is `none`" in server.run(prompt | {EXPORT: export}).error


def test_pictures_of_a_mesh_say_which_package_they_need(server):
    """It is not installed here, because nothing else needs it."""
    inputs = {"mesh": [DECODE, 0], "sides": 1, "azimuth": 0.0, "elevation": 15.0, "resolution": 64}
    prompt = graph(seed=42) | {"8": {"class_type": "D3DS2MeshPictures", "inputs": inputs}}
    prompt["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 1]}}
    assert "rendering needs embreex, which is not installed: pip install embreex" in server.run(prompt).error


def test_a_prefix_may_come_from_another_node(server):
    prompt = graph()
    prompt["8"] = {"class_type": "PrimitiveString", "inputs": {"value": "linked/name"}}
    prompt[EXPORT]["inputs"]["filename_prefix"] = ["8", 0]
    (file,) = files_of(server, server.run(prompt))
    assert file.name.startswith("name_") and file.parent.name == "linked"


def test_rembg_is_refused_before_the_prompt_runs(server):
    """It is not installed here."""
    inputs = {"image": [PICTURE, 0], "method": "rembg", "invert_mask": "auto", "foreground_ratio": 0.9}
    prompt = graph() | {"8": {"class_type": "D3DS2RemoveBackground", "inputs": inputs}}
    prompt[STRUCTURE]["inputs"]["image"] = ["8", 0]
    with pytest.raises(PromptRefused, match="rembg is not installed: pip install"):
        server.run(prompt)


def test_an_empty_mask_says_what_to_do(server):
    Image.new("RGBA", (64, 48), (200, 90, 10, 0)).save(server.input / "nothing.png")
    prompt = graph()
    prompt[PICTURE]["inputs"]["image"] = "nothing.png"
    prompt["8"] = {
        "class_type": "D3DS2RemoveBackground",
        "inputs": {
            "image": [PICTURE, 0],
            "mask": [PICTURE, 1],
            "method": "auto",
            "invert_mask": "yes",
            "foreground_ratio": 0.9,
        },
    }
    for node in (STRUCTURE, LATENT):
        prompt[node]["inputs"]["image"] = ["8", 0]
    assert "Connect a mask that is 1 on the object" in server.run(prompt).error


def test_too_many_tokens_are_refused_before_work(server):
    run = server.run(graph(max_tokens=1))
    assert "more than max_tokens 1" in run.error and not [text for text in run.all("text") if text[0] == LATENT]


def test_memory_stays_over_ten_prompts(server):
    """The first prompts fill caches; the next ten leave nothing behind."""
    for seed in range(100, 104):
        assert server.run(graph(seed=seed)).end == "execution_success"
    before = server.memory()
    for seed in range(200, 210):
        assert server.run(graph(seed=seed)).end == "execution_success"
    assert server.memory() - before < 32 << 20


def test_unloading_gives_the_memory_of_the_networks_back(server):
    """Nothing of ours keeps a network alive that ComfyUI has unloaded."""
    prompt = {key: node for key, node in graph(model="tiny", steps=1).items() if key in (MODEL, PICTURE, STRUCTURE)}
    prompt[VIEW] = {"class_type": "PreviewAny", "inputs": {"source": [STRUCTURE, 2]}}
    assert server.run(prompt).end == "execution_success"
    weights = sum(file.stat().st_size for file in TINY.glob("*.safetensors"))  # half precision; loaded, twice as much
    loaded = server.memory()
    for _ in range(300):  # while ComfyUI collects garbage, every ten seconds, it misses the button
        server.free()
        time.sleep(1)
        if loaded - server.memory() > weights:
            break
    assert loaded - server.memory() > weights
    assert server.run(prompt).end == "execution_success"

"""Our mesh in core's own mesh nodes: its size, closedness and volume before and after each."""

from pathlib import Path

import pytest
import trimesh

from tests.comfy.prompts import DECODE, EXPORT, graph
from tests.comfy.server import ComfyServer
from tests.support.tiny_model import draw_object

SIGNED = {"sign_mode": "sdf", "sign_mode.qef": True, "sign_mode.manifold": False}
# node: its inputs beside those that have defaults, and whether its result is still closed
CORE = {
    "SaveGLB": ({}, True),
    "RemeshMesh": ({"resolution": 256, **SIGNED}, True),
    "DecimateMesh": ({"target_face_count": 3000}, True),
    "FillHoles": ({}, True),
    "UnwrapMesh": ({"segmenter": "adaptive"}, False),  # it cuts the surface along seams
}


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> ComfyServer:
    draw_object(mode="RGB").save(comfyui.input / "object.png")
    return comfyui


def defaults(info: dict) -> dict:
    """Return the default of each required widget of a node."""
    return {
        name: options[0].get("default", kind[0] if isinstance(kind, list) else options[0].get("options", [None])[0])
        for name, (kind, *options) in info["input"].get("required", {}).items()
        if options and ("default" in options[0] or "options" in options[0])
    }


def saved(server: ComfyServer, prompt: dict) -> dict[str, trimesh.Trimesh]:
    """Run a prompt and return the mesh of each node that saved one."""
    run = server.run(prompt)
    assert run.end == "execution_success", run.error
    files = {
        node: Path(shown["3d"][0]["subfolder"], shown["3d"][0]["filename"])
        for node, shown in run.outputs.items()
        if "3d" in shown
    }
    return {node: trimesh.load(server.output / file, force="mesh") for node, file in files.items()}


@pytest.mark.parametrize("name", CORE)
def test_core_keeps_size_and_volume_of_our_mesh(server, name):
    known = server.get("/object_info")
    if name not in known:
        pytest.skip(f"this ComfyUI has no {name}: it came with 0.33")
    more, closed = CORE[name]
    prompt = graph(seed=42)  # other tests have made its mesh already
    if name != "SaveGLB":
        prompt = graph(model="tiny", seed=3, steps=2, keep_largest=True)
        prompt["8"] = {"class_type": name, "inputs": defaults(known[name]) | more | {"mesh": [DECODE, 0]}}
    prompt["9"] = {
        "class_type": "SaveGLB",
        "inputs": {"mesh": ["8" if "8" in prompt else DECODE, 0], "filename_prefix": "core/a"},
    }
    prompt[EXPORT]["inputs"]["size"] = 0.0  # as the node gives it
    meshes = saved(server, prompt)
    before, after = meshes[EXPORT], meshes["9"]
    assert abs(before.bounds).max() <= 0.5 and before.extents.max() > 0.3 and before.is_watertight
    assert after.extents == pytest.approx(before.extents, rel=0.02)
    assert after.is_watertight or not closed
    assert after.volume == pytest.approx(before.volume, rel=0.05)

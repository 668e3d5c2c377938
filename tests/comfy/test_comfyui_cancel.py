"""Cancel in a real ComfyUI: a node that is held in the midst of its work ends there, and no layer begins after it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.comfy.prompts import DECODE, EXPORT, LATENT, MODEL, STRUCTURE, graph
from tests.comfy.server import ComfyServer, Graph
from tests.support.tiny_model import draw_object

WAIT_SECONDS = 300  # for the server to reach a place; only a failing test waits so long


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> ComfyServer:
    draw_object(mode="RGB").save(comfyui.input / "object.png")
    return comfyui


@contextmanager
def watched(server: ComfyServer, place: str) -> Iterator[None]:
    """Hold the server when it reaches `place`, and release it at the end."""
    server.post("/witness", {"place": place})
    try:
        yield
    finally:
        server.post("/witness/release", {})
        server.post("/witness/leave", {})


def wait_until(server: ComfyServer, what: str, condition: Callable[[dict], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition(state := server.get("/witness")):
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not within {WAIT_SECONDS} s, {state}")
        time.sleep(0.05)


def with_mesh(prompt: Graph, node_id: str) -> Graph:
    """Replace the sampler before a node, or the source of its structure, by a node that reads a mesh."""
    from_voxels = {"voxel": [STRUCTURE, 1], "algorithm": "surface net", "threshold": 0.5}
    prompt["8"] = {"class_type": "VoxelToMesh", "inputs": from_voxels}
    from_mesh = {"model": [MODEL, 0], "mesh": ["8", 0], "fit": True, "shell": 0.55}
    prompt["9"] = {"class_type": node_id, "inputs": from_mesh}
    if node_id == "D3DS2StructureFromMesh":
        prompt[LATENT]["inputs"]["structure"] = ["9", 0]
    else:
        prompt[DECODE]["inputs"]["latent"] = ["9", 0]
        del prompt[LATENT]
    return prompt


@pytest.mark.parametrize(
    ("node", "place"),
    [
        pytest.param(STRUCTURE, "networks.structure_dit.StructureDiT", id="structure"),
        pytest.param(LATENT, "networks.latent_dit.LatentDiT", id="latent"),
    ],
)
def test_no_layer_and_no_step_begins_after_cancel(server, node, place):
    prompt = graph(seed=300 + int(node))  # nothing is found in the cache

    def press():
        wait_until(server, place, lambda state: state["held"])
        server.post("/interrupt", {})
        server.post("/witness/release", {})

    with watched(server, place):
        run = server.run(prompt, meanwhile=press)
        assert run.end == "execution_interrupted", run.error
        state = server.get("/witness")
        assert state["layers"] == 0 and not state["expired"]
    assert run.all("execution_interrupted")[0]["node_id"] == node and EXPORT not in run.executed
    assert not [data for data in run.all("progress") if data["node"] == node and data["value"] > 0]
    assert server.run(prompt).end == "execution_success"


@pytest.mark.parametrize(
    ("node_id", "place", "seed"),
    [
        pytest.param("D3DS2VAEDecodeSDF", "layers.attention.WindowAttention", 310, id="decode"),
        pytest.param("D3DS2VAEEncodeMesh", "networks.sdf_vae.Encoder", 311, id="encode"),
        pytest.param("D3DS2VAEEncodeMesh", "meshes.mesh_to_sdf.mesh_to_sdf", 312, id="distances"),
        pytest.param("D3DS2StructureFromMesh", "meshes.mesh_to_sdf.mesh_to_sdf", 313, id="structure-from-mesh"),
    ],
)
def test_cancel_waits_for_no_call_and_no_layer_of_it_begins(server, node_id, place, seed):
    """The node ends while its thread is held; when released, the thread begins no further layer."""
    prompt, node = graph(seed=seed), DECODE
    if node_id != "D3DS2VAEDecodeSDF":
        prompt, node = with_mesh(prompt, node_id), "9"

    def press():
        wait_until(server, place, lambda state: state["held"])
        server.post("/interrupt", {})

    with watched(server, place):
        run = server.run(prompt, meanwhile=press)
        assert run.end == "execution_interrupted", run.error
        assert server.get("/witness") == {"held": True, "working": True, "layers": 0, "expired": False}
        server.post("/witness/release", {})
        wait_until(server, "the end of the thread", lambda state: not state["working"])
        assert server.get("/witness")["layers"] == 0
    assert run.all("execution_interrupted")[0]["node_id"] == node and EXPORT not in run.executed
    assert server.run(prompt).end == "execution_success"

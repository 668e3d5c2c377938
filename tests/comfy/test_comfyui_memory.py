"""A real ComfyUI's memory manager under its switches: a network runs as a whole on its device, or says why it cannot.

There is no GPU here. So ComfyUI runs with `meta` as its device, where tensors have no data: where each weight ends up
is real, and nothing is computed.
"""

import functools
import json
import subprocess

import pytest

from tests.comfy.installation import PACK, SOURCES, install

STATES = ("NORMAL_VRAM", "LOW_VRAM", "NO_VRAM", "HIGH_VRAM")
SCRIPT = """
import importlib.util, json, sys
pack, *states = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.model_management as mm
import comfy.model_patcher

mm.get_torch_device = lambda: torch.device("meta")
mm.get_total_memory = lambda *arguments, **options: 8 << 30
mm.get_free_memory = lambda *a, torch_free_too=False, **k: (8 << 30, 8 << 30) if torch_free_too else 8 << 30
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.nodes.comfy import memory
from pack.nodes.comfy.sockets import Model

def load(state, kind):
    mm.vram_state = mm.VRAMState[state]
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GroupNorm(2, 8))
    network.register_parameter("beside", torch.nn.Parameter(torch.zeros(4)))
    patcher = memory.make_patcher(network)
    if kind == "stubborn":
        patcher.partially_load = lambda *arguments, **options: None
    try:
        memory.load_networks(Model("m", None, {"network": patcher}), ("network",), 0, "It", "advice")
        error = None
    except ValueError as raised:
        error = str(raised)
    devices = sorted({str(tensor.device) for tensor in network.parameters()})
    mm.current_loaded_models.clear()  # nothing can be moved back from meta
    return devices, error

print(json.dumps({state: [load(state, kind) for kind in ("obedient", "stubborn")] for state in states}))
"""


@functools.cache
def loads(version: str) -> dict[str, list]:
    """Load two networks under each of ComfyUI's VRAM states, in one process.

    The second network is one that ComfyUI does not bring to the device. Returns where the weights are, and the error.
    """
    installation = install(version)
    command = [str(installation.python), "-c", SCRIPT, str(PACK), *STATES]
    done = subprocess.run(command, cwd=installation.source, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("version", SOURCES)
@pytest.mark.parametrize("state", STATES)
def test_a_network_is_on_its_device_as_a_whole(version, state):
    assert loads(version)[state][0] == [["meta"], None]


@pytest.mark.parametrize("version", SOURCES)
def test_a_network_that_comfyui_does_not_bring_is_refused(version):
    error = loads(version)["NO_VRAM"][1][1]
    assert "network runs only as a whole" in error and "start ComfyUI without --novram" in error

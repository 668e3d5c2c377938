"""Two tabs that run prompts at once, and a server killed in the middle of one: the right text, distinct files."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.comfy.installation import SOURCES, install
from tests.comfy.prompts import EXPORT, LATENT, STRUCTURE, graph
from tests.comfy.server import ComfyServer
from tests.support.tiny_model import draw_object, write_model

WAIT_SECONDS = 300  # for the server to reach a place; only a failing test waits so long
NEWEST = [*SOURCES][-1]


@pytest.fixture(scope="module")
def server(comfyui: ComfyServer) -> ComfyServer:
    draw_object(mode="RGB").save(comfyui.input / "object.png")
    return comfyui


def test_two_tabs_see_their_own_texts_and_get_their_own_files(server):
    levels = {"a": 0.0, "b": 0.2}  # which change the number of faces
    prompts = [graph(seed=77, level=level, filename_prefix="tabs/mesh") for level in levels.values()]
    with ThreadPoolExecutor(2) as tabs:
        runs = list(tabs.map(server.run, prompts))
    files, texts = [], []
    for run in runs:
        assert run.end == "execution_success", run.error
        (shown,) = run.outputs[EXPORT]["3d"]
        files.append(shown["filename"])
        texts.append(run.outputs[EXPORT]["status_text"][0])
        seen = {text for node, text in run.all("text") if node == EXPORT and " faces in " in text}
        assert seen == {texts[-1]} and shown["filename"] in texts[-1]  # and nothing of the other tab
    assert len(set(files)) == 2 and texts[0].split()[0] != texts[1].split()[0]
    assert all((server.output / "tabs" / file).stat().st_size > 1000 for file in files)


@pytest.mark.long
def test_after_a_restart_in_the_middle_the_prompt_runs_as_if_nothing_had_been(tmp_path):
    write_model(tmp_path / "models" / "direct3d_s2" / "random", structure_vae={"threshold": 0.65})
    server = ComfyServer(install(NEWEST), tmp_path)
    draw_object(mode="RGB").save(server.input / "object.png")
    with server:
        server.post("/prompt", {"prompt": graph(steps=200), "client_id": "killed"})
        end = time.monotonic() + WAIT_SECONDS
        while "got prompt" not in server.log and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(3)  # the model is loaded, and the structure is being sampled
        assert server.get("/queue")["queue_running"]
        server.process.kill()
        server.process.wait()
    assert not list(server.output.rglob("*.*"))
    with server:
        run = server.run(graph())
        assert run.end == "execution_success" and {STRUCTURE, LATENT, EXPORT} <= run.executed
        (shown,) = run.outputs[EXPORT]["3d"]
        assert shown["filename"] == "mesh_00001_.glb" and shown["filename"] in run.outputs[EXPORT]["status_text"][0]
    assert [file.name for file in server.output.rglob("*.*")] == ["mesh_00001_.glb"]

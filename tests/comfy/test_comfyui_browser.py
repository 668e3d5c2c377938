"""A real front end in headless Chromium: each template opens, runs at a press of Run, and shows its meshes.

`make test` opens the first in every ComfyUI and the one with two viewers in the newest, `make test-long` the others;
test_comfyui_prompts.py runs all of them in every version.
"""

import json

import pytest

from tests.comfy.installation import SOURCES
from tests.comfy.page import open_template, overlapping, press_run, status_texts, viewer_boxes, wait_for_mesh
from tests.comfy.workflow_file import BLUEPRINT, WORKFLOWS, nodes_of, read, to_prompt

RUN_SECONDS = 600
NOT_OURS = (  # console messages that come without any template as well
    "ComfyApp graph accessed before initialization",  # front end 1.47, at every start
    "/favicon.ico",  # front end 1.39
    ".glb.png",  # it looks for a picture beside each mesh, and core's own nodes write none either
    "/user.css",  # not found before the user has saved any
    "/api/userdata",
    "https://huggingface.co/Comfy-Org/",  # models of the front end's own first workflow, which it cannot reach
)
NEWEST = [*SOURCES][-1]
NODES_2 = "Comfy.VueNodes.Enabled"
# the widgets of the first release; after a seed comes one of the front end's own
FIRST_WIDGETS = {"D3DS2MeshExport": 5, "D3DS2SparseStructureSample": 4, "D3DS2SSADiTSample": 5}


TEMPLATES = [WORKFLOWS[0]]
for file in WORKFLOWS[1:]:
    mark = pytest.mark.newest if file.stem == "Refine-a-Mesh" else pytest.mark.long
    TEMPLATES.append(pytest.param(file, marks=mark))


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_templates_open_run_and_show_their_meshes(comfyui, browser, file):
    prompt = open_and_compare(comfyui, browser, file)
    if comfyui.installation.version == NEWEST or file == WORKFLOWS[0]:
        run_and_look(browser, prompt, seed=WORKFLOWS.index(file))
    errors = [error for error in browser.errors if not any(part in error for part in NOT_OURS)]
    assert not errors, errors


@pytest.mark.long
@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_templates_open_run_and_show_their_meshes_in_nodes_2(comfyui, browser, file):
    comfyui.post(f"/settings/{NODES_2}", True)
    try:
        prompt = open_and_compare(comfyui, browser, file)
        browser.wait_for("return LiteGraph.vueNodesMode", 30, "Nodes 2.0")
        browser.js("await app.extensionManager.command.execute('Comfy.Canvas.FitView')")  # front end 1.39 spreads nodes
        run_and_look(browser, prompt, seed=len(WORKFLOWS) + WORKFLOWS.index(file))
    finally:
        comfyui.post(f"/settings/{NODES_2}", False)
    errors = [error for error in browser.errors if not any(part in error for part in NOT_OURS)]
    assert not errors, errors


@pytest.mark.newest
def test_the_blueprint_opens_and_runs(comfyui, browser):
    """The subgraph is put on the canvas with a picture before it; the page posts the prompt of its inner nodes."""
    open_template(browser, comfyui, WORKFLOWS[0].stem, len(read(WORKFLOWS[0])["nodes"]))
    browser.js(f"await app.loadGraphData({json.dumps(read(BLUEPRINT))})")
    browser.js(
        "const host = app.graph._nodes[0], load = LiteGraph.createNode('LoadImage'); app.graph.add(load);"
        "load.widgets.find(w => w.name === 'image').value = 'd3ds2_demo_background.png';"
        "for (const name of ['image', 'mask']) load.connect(name === 'mask' ? 1 : 0, host, host.findInputSlot(name));"
    )
    names = browser.js("return app.graph._nodes[0].widgets.map(w => w.name)")
    assert names == ["model", "seed", "steps", "target_faces", "filename_prefix"]
    browser.js(
        "const values = {seed: 11, steps: 1, target_faces: 5000, filename_prefix: '3d/blueprint'};"
        "for (const w of app.graph._nodes[0].widgets) if (w.name in values) w.value = values[w.name];"
    )
    posted = browser.js("return (await app.graphToPrompt()).output")
    values = {node["class_type"]: node["inputs"] for node in posted.values()}
    for name in ("D3DS2SparseStructureSample", "D3DS2SSADiTSample"):
        assert (values[name]["seed"], values[name]["steps"]) == (11, 1)
    assert (values["D3DS2MeshExport"]["target_faces"], values["LoadD3DS2Model"]["model"]) == (5000, "tiny")
    assert "mask" in values["D3DS2RemoveBackground"]
    if comfyui.installation.version == NEWEST:
        press_run(browser, RUN_SECONDS)
        assert list((comfyui.output / "3d").glob("blueprint_*.glb"))
    errors = [error for error in browser.errors if not any(part in error for part in NOT_OURS)]
    assert not errors, errors


@pytest.mark.newest
def test_our_sockets_have_colours_in_every_palette(comfyui, browser):
    open_template(browser, comfyui, WORKFLOWS[0].stem, len(read(WORKFLOWS[0])["nodes"]))
    for palette in ("dark", "light"):
        browser.js(f"await app.extensionManager.setting.set('Comfy.ColorPalette', '{palette}')")
        browser.wait_for("return app.canvas.default_connection_color_byType.D3DS2_MODEL === '#b39ddb'", 30, palette)
        css = "getComputedStyle(document.documentElement).getPropertyValue('--color-datatype-D3DS2_LATENT')"
        assert browser.js(f"return {css}").strip() == "#ff9cf9"
    browser.js("await app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


@pytest.mark.newest
def test_a_workflow_that_was_saved_before_there_were_more_widgets_opens(comfyui, browser):
    """New widgets come last and get their defaults; no value slips into another widget."""
    workflow = read(WORKFLOWS[0])
    for node in workflow["nodes"]:
        if node["type"] in FIRST_WIDGETS:
            node["widgets_values"] = node["widgets_values"][: FIRST_WIDGETS[node["type"]]]
    expected = to_prompt(workflow, comfyui.get("/object_info"))
    assert {node["class_type"] for node in expected.values()} >= FIRST_WIDGETS.keys()
    open_template(browser, comfyui, WORKFLOWS[0].stem, len(workflow["nodes"]))
    browser.js(f"await app.loadGraphData({json.dumps(workflow)})")
    posted = browser.js("return (await app.graphToPrompt()).output")
    for key, node in expected.items():
        assert {name: posted[key]["inputs"][name] for name in node["inputs"]} == node["inputs"], node["class_type"]
    (export,) = (node["inputs"] for node in posted.values() if node["class_type"] == "D3DS2MeshExport")
    assert export["size"] == 1 and export["up_axis"] == "Y" and export["embed_workflow"] is True


def open_and_compare(comfyui, browser, file):
    """Open a template, check that the page would post the prompt in its file, and return that prompt."""
    workflow = read(file)
    open_template(browser, comfyui, file.stem, len(workflow["nodes"]))
    expected = to_prompt(workflow, comfyui.get("/object_info"))
    posted = browser.js("return (await app.graphToPrompt()).output")
    assert set(posted) == set(expected)
    for key, node in expected.items():
        seen = posted[key]
        assert seen["class_type"] == node["class_type"]
        assert {name: seen["inputs"][name] for name in node["inputs"]} == node["inputs"]
    assert not browser.js("return app.graph._nodes.filter(n => n.has_errors).map(n => n.type)")
    return expected


def run_and_look(browser, prompt, seed):
    """Run a template with one step; a seed and a ratio of its own keep out results of other templates."""
    count = len(nodes_of(prompt, "Preview3D"))
    empty = [browser.picture(box) for box in viewer_boxes(browser, count)]
    browser.js(
        f"const values = {{steps: 1, seed: {seed}, foreground_ratio: {0.9 - seed / 100}}};"
        "const widgets = app.graph._nodes.flatMap(node => node.widgets ?? []);"
        "for (const w of widgets) if (w.name in values) w.value = values[w.name];"
    )
    press_run(browser, RUN_SECONDS)
    for index, before in enumerate(empty):
        wait_for_mesh(browser, index, before)
    assert not overlapping(browser)
    texts = status_texts(browser)
    ours = {key: node["class_type"] for key, node in prompt.items() if "D3DS2" in node["class_type"]}
    missing = {ours[key] for key in set(ours) - set(texts)}
    assert missing <= {"LoadD3DS2Model"}, missing  # its result may be in the cache, from another template
    for key, name in ((key, name) for key, name in ours.items() if key in texts):
        expected = {"D3DS2MeshExport": "faces in", "LoadD3DS2Model": "tiny: ", "D3DS2RemoveBackground": "picture 1/1"}
        assert expected.get(name, "tokens") in texts[key], (name, texts[key])

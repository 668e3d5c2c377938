"""A real front end in headless Chromium: each template opens, runs at a press of Run, and shows its meshes."""

import pytest

from tests.comfy.page import open_template, press_run, viewer_boxes, wait_for_mesh
from tests.comfy.workflow_file import WORKFLOWS, nodes_of, read, to_prompt

RUN_SECONDS = 240
NOT_OURS = (  # what the console says without any template
    "ComfyApp graph accessed before initialization",  # front end 1.47, at every start
    "/favicon.ico",  # front end 1.39
    ".glb.png",  # the same looks for pictures beside meshes, which core's own nodes do not write either
    "/user.css",  # what a user has not saved yet is not found
    "/api/userdata",
    "https://huggingface.co/Comfy-Org/",  # the models of the front end's own first workflow, which it cannot look up
)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_templates_open_run_and_show_their_meshes(comfyui, browser, file):
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

    count = len(nodes_of(expected, "Preview3D"))
    empty = [browser.picture(box) for box in viewer_boxes(browser, count)]
    browser.js("app.graph._nodes.forEach(n => (n.widgets ?? []).forEach(w => {if (w.name === 'steps') w.value = 1}))")
    press_run(browser, RUN_SECONDS)
    for index, before in enumerate(empty):
        wait_for_mesh(browser, index, before)
    errors = [error for error in browser.errors if not any(part in error for part in NOT_OURS)]
    assert not errors, errors

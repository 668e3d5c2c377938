"""A real front end in headless Chromium: each template opens, runs at a press of Run, and shows its meshes.

In older versions of ComfyUI each opens, and one is run here; test_comfyui_prompts.py runs all of them in each version.
"""

import pytest

from tests.comfy.installation import SOURCES
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


*OLDER, NEWEST = SOURCES
RUNS = [(NEWEST, file) for file in WORKFLOWS] + [(version, WORKFLOWS[0]) for version in OLDER]
OPENED = [(version, file) for version in OLDER for file in WORKFLOWS[1:]]


def in_each(pairs):
    """A real ComfyUI and a template in it."""
    ids = [f"comfyui-{version}-{file.stem}" for version, file in pairs]
    return pytest.mark.parametrize(("comfyui", "file"), pairs, ids=ids, indirect=["comfyui"])


@in_each(OPENED)
def test_templates_open(comfyui, browser, file):
    open_and_compare(comfyui, browser, file)
    assert_no_error(browser)


@in_each(RUNS)
def test_templates_open_run_and_show_their_meshes(comfyui, browser, file):
    prompt = open_and_compare(comfyui, browser, file)
    count = len(nodes_of(prompt, "Preview3D"))
    empty = [browser.picture(box) for box in viewer_boxes(browser, count)]
    browser.js("app.graph._nodes.forEach(n => (n.widgets ?? []).forEach(w => {if (w.name === 'steps') w.value = 1}))")
    press_run(browser, RUN_SECONDS)
    for index, before in enumerate(empty):
        wait_for_mesh(browser, index, before)
    assert_no_error(browser)


def open_and_compare(comfyui, browser, file):
    """What the page would post is the prompt that it returns, as the file says."""
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


def assert_no_error(browser):
    errors = [error for error in browser.errors if not any(part in error for part in NOT_OURS)]
    assert not errors, errors

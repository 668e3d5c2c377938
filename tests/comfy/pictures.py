"""Make the pictures of the templates and of the README in a real ComfyUI; each template runs as shipped.

    .venv/bin/python -m tests.comfy.pictures [TEMPLATE ...] [Nodes-2]

workflows/<template>.jpg is what its last 3D viewer shows. web/images/comfyui_<template>.jpg is the whole window, for
those templates that the README shows. Its name has underscores and small letters. comfyui_nodes_2.jpg is the window of
Image-to-Mesh in Nodes 2.0.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.comfy.browser import Browser
from tests.comfy.installation import PACK, install
from tests.comfy.page import open_template, press_run, viewer_boxes, wait_for_mesh
from tests.comfy.server import ComfyServer
from tests.comfy.workflow_file import WORKFLOWS, read

VERSION = "0.30.0"
RUN_SECONDS = 1800
IN_README = ("Image-to-Mesh", "Refine-a-Mesh", "Nodes-2")
WIDTH = 1600  # pixels of a window's picture in the README
THUMBNAIL = 400
EDGE = 10  # pixels cut from each side of the viewer
WINDOW = {"width": 2200, "height": 1250, "deviceScaleFactor": 1, "mobile": False}  # smaller views hide texts
CLOSE_UP = """
const node = app.graph._nodes.filter(n => n.type === 'Preview3D').at(-1), view = app.canvas.ds;
for (const other of app.graph._nodes) if (other !== node) other.pos = [other.pos[0] - 9000, other.pos[1]];
view.scale = 1; view.offset = [300 - node.pos[0], 200 - node.pos[1]]; app.canvas.setDirty(true, true);
"""


def main(names: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(install(VERSION), Path(folder) / "comfyui") as server,
        Browser(Path(folder)) as page,
    ):
        page.call("Emulation.setDeviceMetricsOverride", **WINDOW)
        for file in WORKFLOWS:
            if not names or file.stem in names:
                take_window(page, server, file, file.stem)
                take_thumbnail(page, file)
        if not names or "Nodes-2" in names:
            server.post("/settings/Comfy.VueNodes.Enabled", True)
            take_window(page, server, WORKFLOWS[0], "Nodes-2")


def take_window(page: Browser, server: ComfyServer, file: Path, name: str) -> None:
    """Run a template; take the whole window if the README shows it."""
    workflow = read(file)
    open_template(page, server, file.stem, len(workflow["nodes"]))
    count = sum(node["type"] == "Preview3D" for node in workflow["nodes"])
    empty = [page.picture(box) for box in viewer_boxes(page, count)]
    press_run(page, RUN_SECONDS)
    for index, before in enumerate(empty):
        wait_for_mesh(page, index, before)
    page.js("await new Promise(done => setTimeout(done, 3000))")  # until the notices are gone
    if name not in IN_README:
        return
    window = Image.fromarray(page.picture())
    window = window.resize((WIDTH, round(WIDTH * window.height / window.width)), Image.Resampling.LANCZOS)
    window.save(PACK / "web" / "images" / f"comfyui_{name.lower().replace('-', '_')}.jpg", quality=80)


def take_thumbnail(page: Browser, file: Path) -> None:
    """Take the last 3D viewer of the template that has just run."""
    page.js(CLOSE_UP)
    box = viewer_boxes(page, 1)[0]
    side = min(box["width"], box["height"]) - 2 * EDGE
    x, y = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    thumbnail = Image.fromarray(page.picture({"x": x, "y": y, "width": side, "height": side}))
    thumbnail.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(file.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main(sys.argv[1:])

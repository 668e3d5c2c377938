"""ComfyUI's page: open a template, press Run, look into the 3D viewers."""

import numpy as np

from tests.comfy.browser import Browser, PageError
from tests.comfy.server import PACK_NAME, ComfyServer

VIEWERS = (
    "[...document.querySelectorAll('canvas')].filter(c => c.id !== 'graph-canvas' && c.getContext('webgl2'))"
    ".map(c => c.getBoundingClientRect().toJSON()).filter(r => r.width > 100 && r.height > 100)"
)
ENDS = "['execution_success', 'execution_error', 'execution_interrupted']"
BOX = ("x", "y", "width", "height")
DIFFERS, SHARE = 24, 0.05  # of 255; of the viewer's pixels


def open_template(page: Browser, server: ComfyServer, name: str, nodes: int) -> None:
    """As from the list of templates, by a user who has been here before; it has this many nodes."""
    for setting, value in (("TutorialCompleted", True), ("Workflow.Persist", False)):
        server.post(f"/settings/Comfy.{setting}", value)
    page.errors.clear()
    page.open(f"{server.url}/?template={name}&source={PACK_NAME}")
    page.wait_for(f"return app.canvas.graph._nodes.length === {nodes}", 60, f"the graph of {name}")


def viewer_boxes(page: Browser, count: int) -> list[dict[str, float]]:
    """Where the 3D viewers are, in the order of their nodes, once there are `count`."""
    page.wait_for(f"return {VIEWERS}.length === {count}", 60, f"{count} 3D viewers")
    boxes = page.js(f"return {VIEWERS}")
    return [{key: box[key] for key in BOX} for box in boxes]


def press_run(page: Browser, seconds: float) -> None:
    """Click Run, and wait for the end. Raises PageError unless it is success."""
    page.js(
        f"window.ends = []; for (const kind of {ENDS})"
        " app.api.addEventListener(kind, event => window.ends.push([kind, event.detail.exception_message]))"
    )
    button = page.js("return document.querySelector('[data-testid=queue-button]').getBoundingClientRect().toJSON()")
    page.click(button["x"] + button["width"] / 2, button["y"] + button["height"] / 2)
    page.wait_for("return window.ends.length", seconds, "the end of the run")
    end, message = page.js("return [window.ends[0][0], window.ends[0][1]]")
    if end != "execution_success":
        raise PageError(f"{end}: {message}")


def wait_for_mesh(page: Browser, index: int, before: np.ndarray) -> None:
    """Until enough of the viewer's pixels differ from those `before`, (H, W, 3) of the empty one."""
    for _ in range(60):
        box = page.js(f"return {VIEWERS}[{index}]")
        if box:
            now = page.picture({key: box[key] for key in BOX}).astype(int)
            if now.shape == before.shape and (np.abs(now - before).max(axis=-1) > DIFFERS).mean() > SHARE:
                return
        page.js("await new Promise(done => setTimeout(done, 250))")
    raise PageError(f"viewer {index + 1} stayed empty")

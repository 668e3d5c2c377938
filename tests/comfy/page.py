"""ComfyUI's page: open a template, press Run, look into the 3D viewers."""

import time
from itertools import combinations

import numpy as np

from tests.comfy.browser import Browser, PageError
from tests.comfy.server import PACK_NAME, ComfyServer

VIEWERS = (
    "[...document.querySelectorAll('canvas')].filter(c => c.id !== 'graph-canvas' && c.getContext('webgl2'))"
    ".map(c => c.getBoundingClientRect().toJSON()).filter(r => r.width > 100 && r.height > 100)"
)
ENDS = "['execution_success', 'execution_error', 'execution_interrupted']"
LOADING = "Loading 3D Model"  # what a viewer says meanwhile
BOX = ("x", "y", "width", "height")
SQUARE, DIFFERS, SHARE = 8, 24, 0.01  # its edge in pixels; least change, of 255; least share of the squares
SECONDS = 300  # for what the page shows in a second or two; only a page that hangs takes so long


def open_template(page: Browser, server: ComfyServer, name: str, nodes: int) -> None:
    """Open a template as a returning user does from the list, and wait for its `nodes` nodes."""
    for setting, value in (("TutorialCompleted", True), ("Workflow.Persist", False)):
        server.post(f"/settings/Comfy.{setting}", value)
    page.call("Page.navigate", url="about:blank")  # late messages of the last page are not about this one
    page.js("return await new Promise(done => setTimeout(() => done(true), 500))")
    page.errors.clear()
    page.open(f"{server.url}/?template={name}&source={PACK_NAME}")
    there = f"n.length === {nodes} && n.some(node => node.type === 'D3DS2MeshExport')"
    page.wait_for(f"const n = app.canvas.graph._nodes; return {there}", SECONDS, f"the graph of {name}")


def viewer_boxes(page: Browser, count: int) -> list[dict[str, float]]:
    """Wait for `count` 3D viewers on a page at rest, and return their boxes in the order of their nodes."""
    page.wait_for(f"return {VIEWERS}.length === {count}", SECONDS, f"{count} 3D viewers")
    same = (
        f"const a = JSON.stringify({VIEWERS}); await new Promise(done => setTimeout(done, 1000));"
        f"return a === JSON.stringify({VIEWERS})"
    )
    page.wait_for(same, SECONDS, "the page's rest")
    return [{key: box[key] for key in BOX} for box in page.js(f"return {VIEWERS}")]


def overlapping(page: Browser) -> list[tuple[str, str]]:
    """Return the pairs of nodes, by their titles, that cover one another; classic nodes and those of Nodes 2.0."""
    boxes = page.js(
        "const drawn = [...document.querySelectorAll('[data-node-id]')];"
        "if (!LiteGraph.vueNodesMode) return app.graph._nodes.map(n => [n.title, ...n.getBounding()]);"
        "return drawn.map(e => [e, e.getBoundingClientRect()])"
        ".map(([e, r]) => [e.innerText.split('\\n')[0], r.x, r.y, r.width, r.height])"
    )
    return [
        (one[0], other[0])
        for one, other in combinations(boxes, 2)
        if all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (1, 2))
    ]


def press_run(page: Browser, seconds: float) -> None:
    """Click Run and wait for the end. Raises PageError unless the run succeeds."""
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


def status_texts(page: Browser) -> dict[str, str]:
    """Return the line of text under each node, by the node's id, some time after the end of a run."""
    page.js("await new Promise(done => setTimeout(done, 2000))")  # front end 1.58 clears progress texts at the end
    return page.js(
        "return Object.fromEntries(app.graph._nodes.map(n => [n.id, n.widgets?.find("
        "w => w.name === '$$node-text-preview')?.value]).filter(([_, text]) => text))"
    )


def wait_for_mesh(page: Browser, index: int, before: np.ndarray) -> None:
    """Wait until a viewer has loaded its file and shows something solid; `before` (H, W, 3) is its picture when empty.

    Squares of pixels are compared by their means, because the thin lines of the grid come and go.
    """
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        box = page.js(f"return {VIEWERS}[{index}]")
        loading = page.js(f"return document.body.innerText.includes('{LOADING}')")
        if box and not loading:
            page.point_at(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # front end 1.39 draws under it
            now = page.picture({key: box[key] for key in BOX})
            height, width = np.minimum(now.shape, before.shape)[:2]  # a node may grow by a pixel
            changed = abs(_squares(now[:height, :width]) - _squares(before[:height, :width])) > DIFFERS
            if changed.mean() > SHARE:
                return
        page.js("await new Promise(done => setTimeout(done, 250))")
    raise PageError(f"viewer {index + 1} stayed empty: {box}, before {before.shape}")


def _squares(picture: np.ndarray) -> np.ndarray:
    """Return the mean of each square of a picture (H, W, 3): (H // SQUARE, W // SQUARE)."""
    H, W = (edge // SQUARE for edge in picture.shape[:2])
    cut = picture[: H * SQUARE, : W * SQUARE].reshape(H, SQUARE, W, SQUARE, 3)
    return cut.mean(axis=(1, 3, 4))

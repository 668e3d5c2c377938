"""Headless Chromium, driven through its DevTools protocol: a page, its console, its pictures."""

import base64
import io
import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.comfy.installation import find_chromium

WINDOW = (1600, 1000)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--mute-audio",
    "--use-angle=swiftshader",  # WebGL without a GPU, for the 3D viewer
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-gpu-compositing",  # everything else is faster without one: emulating it takes six times as long
    "--disable-gpu-rasterization",  # Debian turns it on
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves the machine
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    f"--window-size={WINDOW[0]},{WINDOW[1]}",
)
SECONDS = 300  # for one answer; only what hangs takes so long
# the 3D viewer draws all the time; without a GPU that takes a whole core from what it waits for
FEW_FRAMES = "window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 200);"
FEW_FRAMES += "window.cancelAnimationFrame = clearTimeout;"


class PageError(Exception):
    """JavaScript raised an error, or something that was waited for did not happen."""


class Browser:
    """`with Browser(folder) as page:` - one page; `folder` gets a fresh profile.

    errors: errors in the console, uncaught exceptions, and failed requests to our own server.
    """

    def __init__(self, folder: Path):
        self.profile = folder / "profile"
        self.errors: list[str] = []
        self._number = 0

    def __enter__(self) -> "Browser":
        import websocket  # here, so that a machine without it can collect the tests; they themselves need it

        command = [find_chromium(), *OPTIONS, f"--user-data-dir={self.profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, start_new_session=True, **quiet)
        port_file = self.profile / "DevToolsActivePort"
        _wait(lambda: port_file.exists() and port_file.read_text().strip(), SECONDS, "Chromium did not start")
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self._socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=SECONDS)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=FEW_FRAMES)
        size = {"width": WINDOW[0], "height": WINDOW[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        return self

    def __exit__(self, *exception) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol and return its result; note what the page reports meanwhile."""
        self._number = number = self._number + 1
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def js(self, body: str) -> Any:
        """Run the body of an async function on the page and return its value; `app` is ComfyUI's."""
        expression = f"(async () => {{ const app = window.app ?? window.comfyAPI?.app?.app; {body} }})()"
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(f"{body}: {details.get('exception', {}).get('description', details['text'])}")
        return result["result"].get("value")

    def wait_for(self, body: str, seconds: float, what: str) -> Any:
        """Evaluate until the answer is true. Raises PageError, naming `what`, if that takes too long."""
        return _wait(lambda: self.js(body), seconds, what)

    def open(self, url: str) -> None:
        """Go to a page of ComfyUI and wait for its graph."""
        self.call("Page.navigate", url=url)
        ready = "return !!(app?.canvas?.graph && app.extensionManager && document.querySelector('canvas'))"
        self.wait_for(ready, 120, f"the front end of {url}")

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse to a point from a few pixels away."""
        for beside in (3, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + beside, y=y)

    def click(self, x: float, y: float) -> None:
        self.point_at(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, box: dict[str, float] | None = None) -> np.ndarray:
        """The page, or the part of it in a box (x, y, width, height): (H, W, 3) uint8."""
        clip = {} if box is None else {"clip": {**box, "scale": 1}}
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def _note(self, message: dict[str, Any]) -> None:
        method, data = message.get("method"), message.get("params", {})
        if method == "Page.javascriptDialogOpening":  # "leave without saving?"
            self._number += 1
            answer = {"id": self._number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            self._socket.send(json.dumps(answer))
        elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "assert"):
            words = [str(part.get("value", part.get("description", ""))) for part in data["args"]]
            self.errors.append(f"console: {' '.join(words)}")
        elif method == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.errors.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
        elif method == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.errors.append(f"log: {data['entry']['text']} {data['entry'].get('url', '')}")


def _wait(ask: Any, seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            raise PageError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)
    return answer

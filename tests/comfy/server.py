"""A ComfyUI server on the loopback interface with this pack in its custom_nodes, and requests to it."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.comfy.installation import PACK, Installation

PACK_NAME = "ComfyUI-D3DS2"
MODULE = f"custom_nodes.{PACK_NAME}"
START_SECONDS = RUN_SECONDS = 600  # only a server that hangs takes so long; starts take 6 to 13, runs fewer
ANSWER_SECONDS = 300
ENDS = ("execution_success", "execution_error", "execution_interrupted")
WITNESS = Path(__file__).parent / "witness.py"
TEXT, PICTURE = 3, 1  # kinds of binary messages
UNUSED = ("--disable-api-nodes", "--disable-auto-launch")

Graph = dict[str, dict[str, Any]]


@dataclass
class Run:
    """The messages about a prompt that a front end receives, from its start to its end.

    messages: (kind, data); status texts have kind "text", live pictures kind "picture".
    """

    prompt_id: str
    messages: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def end(self) -> str:
        return self.messages[-1][0]

    @property
    def error(self) -> str:
        """The message of the node that failed; empty if none did."""
        data = self.messages[-1][1]
        return data["exception_message"] if self.end == "execution_error" else ""

    def all(self, kind: str) -> list[Any]:
        return [data for its, data in self.messages if its == kind]

    @property
    def outputs(self) -> dict[str, dict]:
        """The outputs that nodes show, by node id."""
        return {data["node"]: data["output"] for data in self.all("executed") if data["output"]}

    @property
    def executed(self) -> set[str]:
        """The nodes that ran; the others were found in the cache."""
        return {data["node"] for data in self.all("executing") if data["node"]}


class PromptRefused(Exception):
    """The server refused to queue a prompt; the message is its answer."""


class ComfyServer:
    """`with ComfyServer(installation, folder) as server:` - `folder` gets custom_nodes, models, input and output.

    `elsewhere` is a second folder for models, named in extra_model_paths.yaml.
    """

    def __init__(self, installation: Installation, folder: Path, with_pack: bool = True):
        self.installation, self.folder = installation, folder
        self.output, self.input, self.models = (folder / name for name in ("output", "input", "models"))
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if with_pack:
            (folder / "custom_nodes" / PACK_NAME).symlink_to(PACK)
            (folder / "custom_nodes" / WITNESS.name).symlink_to(WITNESS)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir(exist_ok=True)
        self.paths_file = folder / "extra_model_paths.yaml"
        self.paths_file.write_text(f"elsewhere:\n  base_path: {self.elsewhere}\n  direct3d_s2: ./\n")
        self.log_file = folder / "server.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "ComfyServer":
        source = self.installation.source
        command = [self.installation.python, source / "main.py", "--cpu", "--listen", "127.0.0.1", "--port", self.port]
        own = ("--database-url", f"sqlite:///{self.folder / 'comfyui.db'}")
        own += ("--extra-model-paths-config", self.paths_file)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        }  # no request leaves the machine
        environment |= {
            "MALLOC_MMAP_THRESHOLD_": "131072"
        }  # freed tensors go back to the system, where `memory` sees it
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in (*command, "--base-directory", self.folder, *own, *UNUSED)],
                cwd=source,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        begin = time.monotonic()
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() - begin > START_SECONDS:
                self.__exit__()
                raise RuntimeError(f"ComfyUI {self.installation.version} does not answer:\n{self.log[-4000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return re.sub(r"\x1b\[\d+m", "", self.log_file.read_text())

    def memory(self) -> int:
        """Return the resident memory of the server in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_SECONDS) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers["Content-Type"] else body

    def post(self, path: str, content: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise PromptRefused(error.read().decode()) from None

    def run(self, graph: Graph, meanwhile: Callable[[], None] | None = None, extra: Any = None) -> Run:
        """Post a prompt and listen to its end.

        Args:
            meanwhile: called once the prompt is queued, before the first message is read.
            extra: what the front end sends beside the prompt, such as its workflow.

        Raises:
            PromptRefused: the server does not queue the prompt.
        """
        import websocket  # here, so that the tests can be collected without it

        client = uuid.uuid4().hex
        listener = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=RUN_SECONDS)
        try:
            content = {"prompt": graph, "client_id": client, "extra_data": {"extra_pnginfo": extra or {}}}
            run = Run(self.post("/prompt", content)["prompt_id"])
            if meanwhile is not None:
                meanwhile()
            end = time.monotonic() + RUN_SECONDS
            while not run.messages or run.end not in ENDS:
                kind, data = _read(listener.recv())
                if time.monotonic() > end:
                    raise RuntimeError(f"still running after {RUN_SECONDS} s: {run.messages[-3:]}")
                if not isinstance(data, dict) or data.get("prompt_id", run.prompt_id) == run.prompt_id:
                    run.messages.append((kind, data))
            return run
        finally:
            listener.close()

    def free(self) -> None:
        """Press the button that unloads all models and forgets all results; the server does so soon after."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _read(message: str | bytes) -> tuple[str, Any]:
    if isinstance(message, str):
        content = json.loads(message)
        return content["type"], content["data"]
    kind = int.from_bytes(message[:4], "big")
    if kind == TEXT:
        length = int.from_bytes(message[4:8], "big")
        return "text", (message[8 : 8 + length].decode(), message[8 + length :].decode())
    return ("picture", message[8:]) if kind == PICTURE else (f"binary {kind}", message[4:])

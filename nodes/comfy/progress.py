"""Progress of a node: bar, live picture, status text, and Cancel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, TypeVar

import comfy.model_management as mm
import comfy.utils

from .errors import without_tags

if TYPE_CHECKING:
    import torch
    from PIL import Image

POLL = 0.1  # seconds between two checks of the Cancel button
PREVIEW_SIZE = 512  # pixels: the longest side of a live picture
PREVIEW_SHARE = 0.2  # of the time, at most, goes into drawing pictures

Result = TypeVar("Result")
# set in a thread of `run_cancellable`: tells the thread whether the node has gone on without it
_abandoned: ContextVar[threading.Event | None] = ContextVar("abandoned", default=None)


class Progress:
    """The progress bar of the running node, and the line of text under it."""

    def __init__(self, node_id: str | None, total: int):
        self.node_id, self.total = node_id, total
        self.bar = comfy.utils.ProgressBar(total)
        self.started, self.spent_on_pictures = time.monotonic(), 0.0
        self.picture: Image.Image | None = None

    def status(self, text: str) -> None:
        """Show a line of text on the node, in the browser tab whose prompt runs.

        Old front ends show the text as HTML, so a file named like a tag must not become one.
        """
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)  # none when nodes run without a server
        if server is not None and self.node_id is not None:
            server.send_progress_text(without_tags(text), self.node_id, getattr(server, "client_id", None))

    @contextmanager
    def compiling_shown(self) -> Generator[None]:
        """Say in the line of text if something is compiled in the block, as in the first run on a machine."""
        from ...d3ds2.compiling import announce_compiling

        with announce_compiling(self.status):
            yield

    def result(self, *lines: str) -> dict[str, tuple[str, ...]]:
        """Show the last lines of text, and return them as `ui` output: newer front ends clear progress at a job's end.

        web/status_text.js shows them again. They are not called `text`: ComfyUI 0.16.3 would list that as a file of the
        job, which its own front end cannot read.
        """
        self.status("; ".join(lines))
        return {"status_text": tuple(without_tags(line) for line in lines)}

    def update(self, done: int, picture: Callable[[], Image.Image] | None = None) -> None:
        """Report that `done` of `total` are done. This is a cancel point.

        `picture` draws the live picture. If drawing is slow compared to the steps, some steps show the last picture.
        """
        check_cancelled()
        if picture is not None:
            now = time.monotonic()
            if self.picture is None or self.spent_on_pictures <= PREVIEW_SHARE * (now - self.started):
                self.picture = picture()
                self.spent_on_pictures += time.monotonic() - now
        preview = None if self.picture is None else ("JPEG", self.picture, PREVIEW_SIZE)
        self.bar.update_absolute(done, self.total, preview)


def check_cancelled() -> None:
    """Raise ComfyUI's InterruptProcessingException if the user has cancelled. A call of this is a cancel point."""
    abandoned = _abandoned.get()
    if abandoned is None:
        mm.throw_exception_if_processing_interrupted()
    elif abandoned.is_set():
        raise mm.InterruptProcessingException


@contextmanager
def cancellable(*networks: torch.nn.Module) -> Generator[None]:
    """Make every layer of the networks a cancel point while the block runs."""
    hooks = [
        module.register_forward_pre_hook(lambda _module, _arguments: check_cancelled())
        for network in networks
        for module in network.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_networks(device: torch.device, function: Callable[..., Result], *args) -> Result:
    """Call a function that runs `cancellable` networks, so that Cancel is quick on every device.

    On a CPU a layer may take seconds, so the function runs in a thread. On a GPU layers are short, and kernels must be
    started from the thread that owns the GPU.
    """
    from ...d3ds2.kernels.devices import runs_on_cpu

    return run_cancellable(function, *args) if runs_on_cpu(device) else function(*args)


def run_cancellable(function: Callable[..., Result], *args, **kwargs) -> Result:
    """Call a long function in a thread, and watch the Cancel button meanwhile.

    After Cancel, the thread runs on to its next cancel point or its end, and its result is dropped.
    """
    import torch

    outcome: Future[Result] = Future()
    abandoned = threading.Event()
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        _abandoned.set(abandoned)
        try:
            with torch.inference_mode(inference):
                outcome.set_result(function(*args, **kwargs))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=copy_context().run, args=(work,), daemon=True).start()
    try:
        while True:
            check_cancelled()
            try:
                return outcome.result(timeout=POLL)
            except TimeoutError:
                if outcome.done():  # the function raised it
                    raise
    finally:
        abandoned.set()

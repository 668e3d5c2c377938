"""A file of custom nodes for a ComfyUI under test: it stops a node in its work and counts the layers after that.

It has no nodes, only requests to the server. Before the first request it changes nothing.

    POST /witness {"place": name}   hold the next thread that reaches this place
    GET /witness                    {"held", "working", "layers", "expired"}
    POST /witness/release           let the thread go on
    POST /witness/leave             stop watching

A place is "module.function", or "module.Class" of a network, whose third layer is then held.
"""

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}  # ComfyUI expects one in every such file
HELD_LAYER = 3
HOLD_SECONDS = 300  # then a held thread goes on, so that a failing test ends


class Watch:
    """A thread held at a place, and the number of layers of any network that began after that.

    expired: nobody released the thread within HOLD_SECONDS.
    """

    def __init__(self, place: str):
        self.network, self.layers, self.begun = None, 0, 0
        self.thread: threading.Thread | None = None
        self.expired, self.released = False, threading.Event()
        self.undo = self._watch(place)

    def state(self) -> dict[str, Any]:
        working = self.thread is not None and self.thread.is_alive()
        return {"held": self.thread is not None, "working": working, "layers": self.layers, "expired": self.expired}

    def _watch(self, place: str) -> Callable[[], None]:
        """Watch a place, and return the function that stops watching."""
        module_name, name = place.rsplit(".", 1)
        pack = next(key for key in sys.modules if key.endswith("ComfyUI-D3DS2"))
        module = importlib.import_module(f"{pack}.d3ds2.{module_name}")
        found = getattr(module, name)
        if isinstance(found, type):
            self.network = found
        else:

            @functools.wraps(found)
            def held(*arguments, **options):
                self._hold()
                return found(*arguments, **options)

            setattr(module, name, held)
        hook = torch.nn.modules.module.register_module_forward_pre_hook(self._on_layer)

        def undo() -> None:
            setattr(module, name, found)
            hook.remove()

        return undo

    def _on_layer(self, module: torch.nn.Module, _arguments: tuple) -> None:
        if self.thread is not None:
            self.layers += 1
        elif self.begun or (self.network is not None and isinstance(module, self.network)):
            self.begun += 1
            if self.begun == HELD_LAYER:
                self._hold()

    def _hold(self) -> None:
        if self.thread is None:
            self.thread = threading.current_thread()
            self.expired = not self.released.wait(HOLD_SECONDS)


watches: list[Watch] = []
routes = PromptServer.instance.routes


@routes.post("/witness")
async def watch(request: web.Request) -> web.Response:
    watches[:] = [Watch((await request.json())["place"])]
    return web.json_response(None)


@routes.get("/witness")
async def state(_request: web.Request) -> web.Response:
    return web.json_response(watches[-1].state())


@routes.post("/witness/release")
async def release(_request: web.Request) -> web.Response:
    watches[-1].released.set()
    return web.json_response(None)


@routes.post("/witness/leave")
async def leave(_request: web.Request) -> web.Response:
    watches[-1].undo()
    return web.json_response(None)

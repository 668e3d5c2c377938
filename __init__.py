"""ComfyUI's entry: the V3 extension, and the folder whose `docs` hold the help pages."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

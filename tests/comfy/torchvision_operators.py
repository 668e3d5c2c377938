"""Declare the operators of torchvision before it is imported; a .pth in site-packages of the test ComfyUI runs it.

PyPI has torchvision for CUDA only. Beside a CPU torch its compiled half cannot load, and its Python half then fails
where it describes operators that nobody declared. ComfyUI needs the Python half alone.
"""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareBeforeImport(MetaPathFinder):
    """A finder that finds nothing: it imports torch only when torchvision is imported."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.library.define(operator)


sys.meta_path.insert(0, DeclareBeforeImport())

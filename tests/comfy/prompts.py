"""The prompt that most tests post: all stages from image to mesh."""

from tests.comfy.server import Graph
from tests.comfy.workflow_file import with_widgets

MODEL, PICTURE, STRUCTURE, LATENT, DECODE, EXPORT, VIEW = "1234567"


def graph(**widgets) -> Graph:
    """Return the graph from image to mesh with the model `random`; `widgets` go to every node that has them."""
    nodes = {
        MODEL: ("LoadD3DS2Model", {"model": "random", "precision": "auto"}),
        PICTURE: ("LoadImage", {"image": "object.png"}),
        STRUCTURE: (
            "D3DS2SparseStructureSample",
            {"model": [MODEL, 0], "image": [PICTURE, 0], "seed": 0, "steps": 0, "guidance_scale": 0.0},
        ),
        LATENT: (
            "D3DS2SSADiTSample",
            {
                "model": [MODEL, 0],
                "structure": [STRUCTURE, 0],
                "image": [PICTURE, 0],
                "seed": 0,
                "steps": 0,
                "guidance_scale": 0.0,
                "max_tokens": 250_000,
            },
        ),
        DECODE: (
            "D3DS2VAEDecodeSDF",
            {
                "model": [MODEL, 0],
                "latent": [LATENT, 0],
                "level": 0.0,
                "memory_budget_gb": 0.0,
                "keep_largest": False,
                "min_component": 0.05,
            },
        ),
        EXPORT: (
            "D3DS2MeshExport",
            {
                "mesh": [DECODE, 0],
                "filename_prefix": "test/mesh",
                "format": "glb",
                "target_faces": 0,
                "up_axis": "Y",
                "embed_workflow": True,
            },
        ),
    }
    return with_widgets({key: {"class_type": name, "inputs": inputs} for key, (name, inputs) in nodes.items()}, widgets)

"""Mesh -> pictures of it: shaded, depth, normals and mask, from one side or from several around it."""

from comfy_api.latest import io

from .comfy.errors import plain_errors
from .comfy.mesh_socket import from_socket, mesh_input
from .comfy.sockets import CATEGORY


class MeshPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2MeshPictures",
            display_name="Mesh Pictures",
            category=CATEGORY,
            description="Draws a mesh: shaded, its depth, its normals and its mask. They suit ControlNet, and show the "
            "object from all sides.",
            search_aliases=["render mesh", "depth map", "normal map", "turntable", "controlnet", "d3ds2"],
            inputs=[
                mesh_input("A mesh, a batch of meshes, or a 3D file: Y up, front toward +Z."),
                io.Int.Input(
                    "sides",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="The number of pictures of each mesh, from equal angles around it: 4 shows the front, the "
                    "right, the back and the left.",
                ),
                io.Float.Input(
                    "azimuth",
                    default=0.0,
                    min=-360.0,
                    max=360.0,
                    step=1.0,
                    tooltip="Where the first picture is taken from, in degrees around the object: 0 is the front, 90 "
                    "its +X side.",
                ),
                io.Float.Input(
                    "elevation",
                    default=15.0,
                    min=-90.0,
                    max=90.0,
                    step=1.0,
                    tooltip="How far above the object the camera is, in degrees; negative is below.",
                ),
                io.Int.Input("resolution", default=768, min=16, max=4096, step=8, tooltip="Pixels per edge."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The object in grey, lit from the upper left, on white."),
                io.Image.Output(
                    "depth",
                    tooltip="White where the object is nearest, dark where it is farthest; black beside it.",
                ),
                io.Image.Output(
                    "normals",
                    tooltip="Normals as the camera sees them: red to the right, green up, blue toward the camera, "
                    "which is also the colour beside the object.",
                ),
                io.Mask.Output("mask", tooltip="1 on the object, 0 around it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @plain_errors
    def execute(cls, mesh, sides, azimuth, elevation, resolution) -> io.NodeOutput:
        """Draw each mesh from each side. Raises ValueError, with advice, if embreex is not installed."""
        import torch

        from ..d3ds2.images.mesh_pictures import draw_sides
        from .comfy.progress import Progress, check_cancelled, run_cancellable
        from .comfy.samples import sample

        meshes = from_socket(mesh)
        progress = Progress(cls.hidden.unique_id, sides * len(meshes))
        drawn = []
        for index, own in enumerate(meshes):
            with sample(index, len(meshes)), progress.compiling_shown():
                try:
                    pictures = draw_sides(own.vertices, own.faces, resolution, sides, azimuth, elevation)
                    for _ in range(sides):
                        check_cancelled()
                        drawn.append(run_cancellable(next, pictures))
                        progress.update(len(drawn))
                except ImportError as error:
                    raise ValueError(str(error)) from None
        line = f"{len(drawn)} picture{'s' if len(drawn) > 1 else ''} of {resolution} × {resolution} pixels"
        channels = (torch.from_numpy(channel).float() for channel in stacked(drawn))
        return io.NodeOutput(*channels, ui=progress.result(line))


def stacked(drawn):
    """Return the pictures of each kind, each as one array (B, H, W, 3) or (B, H, W)."""
    import numpy as np

    return [np.stack(kind) for kind in zip(*drawn, strict=True)]

"""Mesh -> file in the output folder."""

from __future__ import annotations

import json
import os
from pathlib import Path, PureWindowsPath
from typing import Any

from comfy_api.latest import Types, io

from .comfy.errors import plain_errors, without_tags
from .comfy.mesh_socket import from_socket, mesh_input
from .comfy.sockets import CATEGORY

FORMATS = ("glb", "obj", "ply", "stl", "3mf")


class MeshExport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D3DS2MeshExport",
            display_name="Mesh Export",
            category=CATEGORY,
            description="Saves meshes to the output folder as glb, obj, ply, stl or 3mf. Drop a saved GLB onto the "
            "canvas to get its workflow back.",
            search_aliases=["save mesh", "export 3d", "glb", "obj", "ply", "stl", "3mf", "print", "decimate", "d3ds2"],
            is_output_node=True,
            inputs=[
                mesh_input("A mesh, a batch of meshes (one file each), or a 3D file to convert."),
                io.String.Input(
                    "filename_prefix",
                    default="3d/d3ds2",
                    tooltip="Subfolder and start of the file name, inside the output folder. %year%, %month%, %day%, "
                    "%hour%, %minute% and %second% are replaced by the date and time.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="glb",
                    tooltip="The file format. UVs, textures and vertex colours of the mesh are kept in a glb, UVs and "
                    "colours in an obj, colours in a ply. stl and 3mf are for printing.",
                ),
                io.Int.Input(
                    "target_faces",
                    default=0,
                    min=0,
                    max=100_000_000,
                    tooltip="Simplify the mesh to about this many faces, or to as few as keep its volume within 5 %; "
                    "0 keeps all of them.",
                ),
                io.Combo.Input(
                    "up_axis",
                    options=["Y", "Z"],
                    default="Y",
                    tooltip="The axis that points up. Y is the convention of glTF and of the viewer; Z suits CAD and "
                    "3D printing.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "embed_workflow",
                    default=True,
                    tooltip="Store the workflow in the GLB, unless ComfyUI runs with --disable-metadata.",
                    advanced=True,
                ),
                io.Float.Input(
                    "size",
                    default=1.0,
                    min=0.0,
                    max=10_000.0,
                    step=0.01,
                    optional=True,  # prompts that were saved before it was there stay valid
                    tooltip="The longest edge of the saved object in metres; stl and 3mf are written in millimetres, "
                    "as slicers read them. 0 keeps the mesh's own size.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "path",
                    is_output_list=True,
                    tooltip="The file's path relative to the output folder, for Preview 3D.",
                ),
                io.File3DAny.Output("file_3d", is_output_list=True, tooltip="The file itself, for ComfyUI's 3D nodes."),
                io.Custom("LOAD3D_CAMERA").Output(
                    "camera", is_output_list=True, tooltip="A camera that sees the whole object, for Preview 3D."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        """Refuse a prefix that cannot work before anything is sampled; None is one that another node will give."""
        try:
            if filename_prefix is not None:
                _check_prefix(filename_prefix)
        except ValueError as error:
            return without_tags(error)
        return True

    @classmethod
    @plain_errors
    def execute(cls, mesh, filename_prefix, format, target_faces, up_axis, embed_workflow, size=1.0) -> io.NodeOutput:
        from ..d3ds2.meshes.appearance import Appearance, in_words, not_held
        from ..d3ds2.meshes.decimation_process import decimate_in_process
        from ..d3ds2.meshes.mesh_file import mesh_bytes
        from ..d3ds2.meshes.placement import in_file_frame
        from .comfy.mesh_looks import looks_of
        from .comfy.progress import Progress, check_cancelled, run_cancellable
        from .comfy.samples import sample
        from .comfy.viewer_camera import camera_of

        meshes = from_socket(mesh)
        looks = looks_of(mesh, meshes)
        folder, name, counter, subfolder = _save_path(filename_prefix)
        metadata = _workflow(cls.hidden) if embed_workflow and format == "glb" else {}
        progress = Progress(cls.hidden.unique_id, len(meshes))
        files, lines, cameras = [], [], []
        for index, (own, look) in enumerate(zip(meshes, looks, strict=True)):
            notes = []
            with sample(index, len(meshes)), progress.compiling_shown():
                if target_faces and len(own.faces) > target_faces:
                    progress.status(f"simplifying {len(own.faces):,} faces to {target_faces:,}")
                    before, own = own, decimate_in_process(own, target_faces, check_cancelled)
                    if len(own.faces) > 1.1 * target_faces:
                        notes.append(f"fewer, such as {target_faces:,}, would change its shape too much")
                    if look.parts and len(own.faces) < len(before.faces):
                        notes.append(f"without {in_words(look.parts)}: it was simplified")
                        look = Appearance()
                if lost := not_held(look, f".{format}"):
                    notes.append(f"without {lost}: {format} holds none")
                own = in_file_frame(own, f".{format}", size, up_axis)
                progress.status(f"writing {len(own.faces):,} faces")
                data = run_cancellable(mesh_bytes, f".{format}", own, metadata, look)
                files.append(_write(folder, name, counter, format, data))
            lines.append("; ".join([f"{len(own.faces):,} faces in {files[-1]}", *notes]))
            cameras.append(camera_of(own.vertices))
            progress.update(index + 1)
        paths = [f"{subfolder}/{file}" if subfolder else file for file in files]
        results = [{"filename": file, "subfolder": subfolder, "type": "output"} for file in files]
        file_3d = [Types.File3D(str(folder / file), format) for file in files]
        return io.NodeOutput(paths, file_3d, cameras, ui={"3d": results} | progress.result(*lines))


def _check_prefix(prefix: str) -> str:
    """Return the absolute path that a prefix stands for.

    Raises ValueError if it has no file name, begins a hidden file, points outside the output folder, or into a folder
    that Windows cannot make.
    """
    import folder_paths

    output = folder_paths.get_output_directory()
    prefix = prefix.replace("\\", "/")
    if "\0" in prefix:
        raise ValueError("filename_prefix contains a NUL character: use a prefix such as 3d/name.")
    target = os.path.abspath(os.path.join(output, prefix))
    if os.path.commonpath((os.path.abspath(output), os.path.dirname(target))) != os.path.abspath(output):
        raise ValueError(
            f"filename_prefix {prefix!r} points outside the output folder {output}: use one inside it, such as 3d/name."
        )
    file = prefix.rsplit("/", 1)[-1].strip()
    if file in ("", ".", ".."):
        raise ValueError(f"filename_prefix {prefix!r} has no file name: use a prefix such as 3d/name.")
    if file.startswith("."):
        raise ValueError(f"filename_prefix {prefix!r} makes a hidden file: use a prefix such as 3d/name.")
    devices = [part for part in prefix.split("/")[:-1] if PureWindowsPath(part).is_reserved()]  # a file gets a number
    if devices:
        raise ValueError(f"filename_prefix {prefix!r}: Windows keeps {devices[0]} for a device: use another folder.")
    return target


def _save_path(prefix: str) -> tuple[Path, str, int, str]:
    """Return the folder, the start of the file name, a free number, and the folder relative to output/.

    Raises ValueError as `_check_prefix`, or if the folder cannot be created.
    """
    import folder_paths

    target = _check_prefix(prefix)
    output, prefix = folder_paths.get_output_directory(), prefix.replace("\\", "/")
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        raise ValueError(f"cannot create the folder for {target}: {error.strerror}. {_WRITE_ADVICE}") from None
    return Path(folder), name, counter, subfolder.replace("\\", "/")


def _write(folder: Path, name: str, number: int, format: str, data: bytes) -> str:
    """Write a whole file or none, under the first free number; return its name.

    Two prompts that write at once get a number each. Raises ValueError, with advice, if the file cannot be written.
    """
    from ..d3ds2.storage.atomic_file import create_numbered, replacing

    path = folder / f"{name}_{number:05}_.{format}"
    try:
        path = create_numbered(folder, f"{name}_", f"_.{format}", number)
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except BaseException:
            path.unlink()
            raise
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}. {_WRITE_ADVICE}") from None
    return path.name


_WRITE_ADVICE = "Make the folder writable, free up disk space, or start ComfyUI with another --output-directory."


def _workflow(hidden: Any) -> dict[str, str]:
    """Return the metadata from which ComfyUI restores the workflow of a GLB; empty under --disable-metadata."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return {}
    metadata = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return metadata | {key: json.dumps(value) for key, value in (hidden.extra_pnginfo or {}).items()}

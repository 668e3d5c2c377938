"""One image in, one mesh out:  python -m d3ds2 chair.png -o chair.glb
Several pictures of one object: python -m d3ds2 chair.png --views left.png right.png -o chair.glb
A mesh of each picture of a folder: python -m d3ds2 PICTURES -o MESHES
Released checkpoints -> a model folder:  python -m d3ds2 convert direct3d-s2-v-1-1 models/official

Progress and errors go to standard error; an error is one line, and the exit code then 2. Of a folder, pictures that
cannot be used are named and skipped, and the exit code is then 1.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .compiling import announce_compiling
from .images.foreground import METHODS, cut_out
from .images.image_file import ImageError, load_image
from .kernels.devices import PRECISIONS, find_device, find_dtype
from .meshes.mesh import Mesh, decimate
from .meshes.mesh_file import FORMATS, MeshFileError, check_mesh_path, check_writable, save_mesh
from .meshes.placement import UP_AXES, check_size, in_file_frame, unit_of
from .networks.chunked_decode import MemoryBudgetError
from .official.config import OfficialError
from .official.convert import (
    IMAGE_ENCODER_FILE,
    OFFICIAL_REPO,
    OFFICIAL_SUBFOLDER,
    convert,
    download_image_encoder,
    download_release,
)
from .picture_folder import list_pictures, make_meshes, make_output_folder, name_meshes
from .pipeline import TINY, GenerationError, Pipeline, load_pipeline
from .rectified_flow import EULER, SAMPLERS, Sampler
from .storage.atomic_file import replacing
from .storage.model_folder import MOST_STEPS, ModelFolderError, load_settings
from .storage.one_line import one_line

PREVIEW_SIZE = 512  # pixels of one picture in the preview


class UsageError(ValueError):
    """The arguments cannot work together."""


class Parser(argparse.ArgumentParser):
    """Without argparse's usage text: an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class ProgressBars:
    """A bar on standard error for each of `stages`, in turn."""

    def __init__(self, stages: tuple[str, ...]):
        self.stages = stages
        self.stage: str | None = None
        self.bar: Any = None  # a tqdm

    def __call__(self, stage: str, step: int, steps: int) -> None:
        if stage != self.stage:
            self.close()
            title = f"{self.stages.index(stage) + 1}/{len(self.stages)} {stage}"
            width = len(f"9/9 {max(self.stages, key=len)}")
            self.stage, self.bar = stage, tqdm(total=steps, desc=f"{title:{width}}", file=sys.stderr, leave=True)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m d3ds2", description="One image in, one watertight mesh out.")
    parser.add_argument(
        "image", type=Path, help="picture of one object, with alpha or on a plain background; or a folder of pictures"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help=f"mesh to write: {', '.join(FORMATS)}; for a folder of pictures the folder of the meshes",
    )
    parser.add_argument(
        "--format", choices=[kind[1:] for kind in FORMATS], default="glb", help="of a folder's meshes (default: glb)"
    )
    parser.add_argument("--again", action="store_true", help="of a folder: also make meshes that are there already")
    parser.add_argument(
        "--size",
        type=float,
        default=1.0,
        help="longest edge in metres, in millimetres within .stl and .3mf files; 0 keeps the model's box of edge 2 "
        "(default: 1)",
    )
    parser.add_argument("--up", choices=UP_AXES, default="Y", help="axis that points up; Z for CAD (default: Y)")
    parser.add_argument("--faces", type=int, help="simplify to about this many faces (default: keep all)")
    parser.add_argument("--views", type=Path, nargs="+", default=[], help="more pictures of the same object")
    parser.add_argument("--model", type=Path, default=TINY, help="model folder (default: the shipped tiny)")
    parser.add_argument("--seed", type=int, default=0, help="one seed, one mesh (default: 0)")
    parser.add_argument("--steps", type=int, help="sampling steps of both diffusion stages (default: the model's)")
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "xpu", "mps", "cpu"),
        default="auto",
        help="default: the first that is here",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the networks (default: fp32 on the CPU, else fp16)"
    )
    parser.add_argument("--mask", type=Path, help="picture that is white on the object, instead of finding it")
    parser.add_argument("--background", choices=METHODS, default="auto", help="how to find the object (default: auto)")
    parser.add_argument("--preview", type=Path, help="picture to write: the input beside the mesh from four sides")
    parser.add_argument("--coarse", action="store_true", help="stop after the first stage of a model that has two")
    parser.add_argument("--refine", action="store_true", help="let the model's refiners tell what is inside")
    parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="heun: two evaluations per step")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=EULER.guidance_interval,
        help="times, 1 is noise and 0 the object, between which guidance acts; other steps take half the time "
        "(default: 0 1)",
    )
    parser.add_argument(
        "--guidance-rescale", type=float, default=0.0, help="0 to 1: curb what strong guidance exaggerates (default: 0)"
    )
    parser.add_argument("--memory", type=float, help="GiB that decoding may take (default: 2)")
    arguments = parser.parse_args(argv)
    if arguments.memory is not None and not 0 < arguments.memory < 1e6:
        raise UsageError(f"expected a positive number of GiB for --memory, got {arguments.memory}")
    if not 0 <= arguments.seed < 2**64:
        raise UsageError(f"expected a seed from 0 to 2^64 - 1, got {arguments.seed}")
    try:
        check_size(arguments.size)
    except ValueError as error:
        raise UsageError(f"--size: {error}") from None
    if arguments.faces is not None and arguments.faces < 4:
        raise UsageError(f"expected --faces of at least 4, got {arguments.faces}")
    if arguments.steps is not None and arguments.steps < 1:
        raise UsageError(f"expected at least 1 step, got {arguments.steps}")
    if arguments.steps is not None and arguments.steps > MOST_STEPS:
        raise UsageError(f"expected at most {MOST_STEPS} steps, got {arguments.steps}")
    try:
        arguments.sampler = Sampler(arguments.sampler, tuple(arguments.guidance_interval), arguments.guidance_rescale)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        arguments.device = find_device(arguments.device)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from None
    return arguments


def check_outputs(output: Path, preview: Path | None, inputs: list[Path]) -> None:
    """See that all that is to be written can be, before any work. Raises MeshFileError, UsageError."""
    check_mesh_path(output)
    taken = {os.path.realpath(path) for path in inputs}  # unlike Path.resolve, it also follows links in a loop
    for path in (output, preview):
        if path is not None and os.path.realpath(path) in taken:
            raise UsageError(f"expected a new file for each result, got {path}, which another argument names")
        taken |= set() if path is None else {os.path.realpath(path)}
    if preview is not None:
        if preview.suffix.lower() != ".png":
            raise UsageError(f"expected a preview that ends in .png, got {preview}")
        if find_spec("embreex") is None:
            raise UsageError("--preview needs embreex: pip install embreex")
        check_writable(preview)


def save_preview(path: Path, image: Image.Image, mesh: Mesh) -> None:
    """The object as it was cut out, and the mesh from the front, the right, behind and the left."""
    from .images.contact_sheet import contact_sheet
    from .images.render import render_sides

    pictures = [image, *render_sides(mesh.vertices, mesh.faces, PREVIEW_SIZE)]
    sheet = contact_sheet([pictures], ("input", "front", "right", "back", "left"), cell=PREVIEW_SIZE)
    try:
        with replacing(path) as temporary:
            sheet.save(temporary)
    except OSError as error:
        raise MeshFileError(f"cannot write {path}: {error.strerror}; the mesh is written") from None


def read_view(path: Path, background: str) -> Image.Image:
    """The object in one more picture of it. Raises ImageError, which names the file."""
    image = load_image(path)
    try:
        return cut_out(image, None, background)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None


def load(arguments: argparse.Namespace) -> Pipeline:
    """The pipeline that the arguments name. Raises ModelFolderError."""
    budget = None if arguments.memory is None else int(arguments.memory * 2**30)
    dtype = find_dtype(arguments.precision, arguments.device)
    return load_pipeline(arguments.model, arguments.device, dtype, memory_budget=budget)


def make_mesh(pipeline: Pipeline, views: list[Image.Image], arguments: argparse.Namespace) -> Mesh:
    """The mesh of the views of one object, simplified if asked for. Raises GenerationError, UsageError."""
    options = {"fine": not arguments.coarse, "use_refiners": arguments.refine, "fine_steps": arguments.steps}
    options["sampler"] = arguments.sampler
    stages = pipeline.stages[:1] if arguments.coarse else pipeline.stages
    bars = ProgressBars(("image", *(name for stage in stages for name in stage.progress)))
    try:
        with announce_compiling(lambda line: tqdm.write(line, file=sys.stderr)):
            mesh = pipeline.generate(views, arguments.seed, bars, arguments.steps, arguments.steps, **options)
    except MemoryBudgetError as error:
        raise UsageError(f"--memory: {error}") from None
    finally:
        bars.close()
    return mesh if arguments.faces is None else decimate(mesh, arguments.faces)


def write_mesh(path: Path, mesh: Mesh, picture: Path, arguments: argparse.Namespace) -> None:
    """Write a mesh in its real size, and a line about it. Raises MeshFileError."""
    made_from = {"model": load_settings(arguments.model)[0], "image": picture.name, "seed": arguments.seed}
    if arguments.views:
        made_from["views"] = ", ".join(view.name for view in arguments.views)
    kind = path.suffix.lower()
    sized = in_file_frame(mesh, kind, arguments.size, arguments.up)
    save_mesh(path, sized, made_from)
    edges = " × ".join(f"{edge:.4g}" for edge in np.ptp(sized.vertices, axis=0))
    size = f", {edges} {unit_of(kind)}" if arguments.size else ""
    print(f"{path}: {len(mesh.vertices)} vertices, {len(mesh.faces)} faces{size}", file=sys.stderr)


def run(argv: list[str] | None) -> int:
    if sys.flags.optimize > 1:
        raise UsageError("transformers reads its own docstrings: run Python without -OO")
    arguments = parse_arguments(argv)
    if arguments.image.is_dir():
        return run_folder(arguments)
    inputs = [path for path in (arguments.image, *arguments.views, arguments.mask) if path is not None]
    check_outputs(arguments.output, arguments.preview, inputs)
    load_settings(arguments.model)  # a wrong folder is said before the slower steps
    image = load_image(arguments.image)
    mask = None if arguments.mask is None else load_image(arguments.mask).convert("L")
    if mask is not None and mask.size != image.size:
        raise UsageError(f"expected a mask of the image's size {image.size}, got {mask.size}")
    image = cut_out(image, mask, arguments.background)
    views = [image, *(read_view(path, arguments.background) for path in arguments.views)]
    mesh = make_mesh(load(arguments), views, arguments)
    write_mesh(arguments.output, mesh, arguments.image, arguments)
    if arguments.preview is not None:
        save_preview(arguments.preview, image, mesh)
    return 0


def run_folder(arguments: argparse.Namespace) -> int:
    """Make a mesh of each picture of a folder; returns 1 if one could not be used, else 0."""
    alone = {"--mask": arguments.mask, "--preview": arguments.preview, "--views": arguments.views}
    if given := [name for name, value in alone.items() if value]:
        raise UsageError(f"expected one picture for {' and '.join(given)}, got the folder {arguments.image}")
    if arguments.output.suffix.lower() in FORMATS:
        raise UsageError(f"expected a folder for the meshes of {arguments.image}, got {arguments.output}")
    load_settings(arguments.model)  # a wrong folder is said before the slower steps
    files = name_meshes(list_pictures(arguments.image), arguments.output, f".{arguments.format}")
    make_output_folder(arguments.output)
    check_mesh_path(next(iter(files.values())))
    pipeline = load(arguments)

    def make(picture: Path, path: Path) -> None:
        mesh = make_mesh(pipeline, [read_view(picture, arguments.background)], arguments)
        write_mesh(path, mesh, picture, arguments)

    counts = make_meshes(files, make, arguments.again)
    print(f"{arguments.output}: {counts}", file=sys.stderr)
    return 1 if counts.failed else 0


def run_convert(argv: list[str]) -> None:
    parser = Parser(prog="python -m d3ds2 convert", description="Released checkpoints -> a model folder.")
    parser.add_argument("source", help="folder of config.yaml and five .ckpt files; with --download a repository")
    parser.add_argument("target", type=Path, help="model folder to make")
    parser.add_argument(
        "--image-encoder",
        type=Path,
        help=f"{IMAGE_ENCODER_FILE} of torch.hub, or a transformers folder (default: the former, in the source)",
    )
    parser.add_argument(
        "--download", action="store_true", help=f"fetch what is missing from Hugging Face; source: {OFFICIAL_REPO}"
    )
    parser.add_argument(
        "--subfolder", default=OFFICIAL_SUBFOLDER, help=f"of the repository (default: {OFFICIAL_SUBFOLDER})"
    )
    arguments = parser.parse_args(argv)
    source, image_encoder = Path(arguments.source), arguments.image_encoder
    if arguments.download:
        if not source.is_dir():
            source = download_release(arguments.source, arguments.subfolder)
        if image_encoder is None and not (source / IMAGE_ENCODER_FILE).exists():
            image_encoder = download_image_encoder()
    version = convert(
        source, arguments.target, image_encoder, lambda name: print(f"converting {name}", file=sys.stderr)
    )
    print(f"{arguments.target}: Direct3D-S2 {version}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 if pictures of a folder failed, 2 after an error, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] != ["convert"]:
            return run(argv)
        run_convert(argv[1:])
    except (UsageError, ImageError, ModelFolderError, MeshFileError, GenerationError, OfficialError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: out of GPU memory; use --device cpu", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk, or a folder without permission
        reason = error if error.filename is None else f"{error.strerror}: {error.filename}"
        print(f"error: {one_line(reason)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

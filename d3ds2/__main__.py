"""One image in, one mesh out:  python -m d3ds2 chair.png -o chair.glb
Released checkpoints -> a model folder:  python -m d3ds2 convert direct3d-s2-v-1-1 models/official

Progress and errors go to standard error; an error is one line, and the exit code then 2.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from tqdm import tqdm

from .images.foreground import METHODS, cut_out
from .images.image_file import ImageError, load_image
from .kernels.devices import PRECISIONS, find_device, find_dtype
from .meshes.mesh import Mesh
from .meshes.mesh_file import FORMATS, MeshFileError, check_mesh_path, check_writable, save_mesh
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
from .pipeline import TINY, GenerationError, load_pipeline
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
    parser.add_argument("image", type=Path, help="picture of one object, with alpha or on a plain background")
    parser.add_argument("-o", "--output", type=Path, required=True, help=f"mesh to write: {', '.join(FORMATS)}")
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
    parser.add_argument("--memory", type=float, help="GiB that decoding may take (default: 2)")
    arguments = parser.parse_args(argv)
    if arguments.memory is not None and not 0 < arguments.memory < 1e6:
        raise UsageError(f"expected a positive number of GiB for --memory, got {arguments.memory}")
    if not 0 <= arguments.seed < 2**64:
        raise UsageError(f"expected a seed from 0 to 2^64 - 1, got {arguments.seed}")
    if arguments.steps is not None and arguments.steps < 1:
        raise UsageError(f"expected at least 1 step, got {arguments.steps}")
    if arguments.steps is not None and arguments.steps > MOST_STEPS:
        raise UsageError(f"expected at most {MOST_STEPS} steps, got {arguments.steps}")
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


def run(argv: list[str] | None) -> None:
    if sys.flags.optimize > 1:
        raise UsageError("transformers reads its own docstrings: run Python without -OO")
    arguments = parse_arguments(argv)
    inputs = [path for path in (arguments.image, arguments.mask) if path is not None]
    check_outputs(arguments.output, arguments.preview, inputs)
    load_settings(arguments.model)  # a wrong folder is said before the slower steps
    image = load_image(arguments.image)
    mask = None if arguments.mask is None else load_image(arguments.mask).convert("L")
    if mask is not None and mask.size != image.size:
        raise UsageError(f"expected a mask of the image's size {image.size}, got {mask.size}")
    image = cut_out(image, mask, arguments.background)

    budget = None if arguments.memory is None else int(arguments.memory * 2**30)
    dtype = find_dtype(arguments.precision, arguments.device)
    pipeline = load_pipeline(arguments.model, arguments.device, dtype, memory_budget=budget)
    options = {"fine": not arguments.coarse, "use_refiners": arguments.refine, "fine_steps": arguments.steps}
    stages = pipeline.stages[:1] if arguments.coarse else pipeline.stages
    bars = ProgressBars(("image", *(name for stage in stages for name in stage.progress)))
    try:
        mesh = pipeline.generate(image, arguments.seed, bars, arguments.steps, arguments.steps, **options)
    except MemoryBudgetError as error:
        raise UsageError(f"--memory: {error}") from None
    finally:
        bars.close()

    made_from = {"model": load_settings(arguments.model)[0], "image": arguments.image.name, "seed": arguments.seed}
    save_mesh(arguments.output, mesh, made_from)
    if arguments.preview is not None:
        save_preview(arguments.preview, image, mesh)
    size = f"{len(mesh.vertices)} vertices, {len(mesh.faces)} faces"
    print(f"{arguments.output}: {size}", file=sys.stderr)


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
    """Run the command line; returns the exit code: 0, 2 after an error, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run_convert(argv[1:]) if argv[:1] == ["convert"] else run(argv)
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

"""Time pictures rendered of surfels against the ray tracer, and compare them, on the same meshes, cameras and lights.

    python benchmarks/rendered_pictures.py MESHES [--count 48] [--batch 256] [--device cuda] [--write]

The ray tracer is that of render_views, in one process, at 256², with the settings of tiny_views.toml; the surfels are
131,072 points of each mesh, as the structure DiT's pictures are made of, at 224². They are timed in turn, without
reading meshes, sampling, or what is built once. Compared are the pictures as the image encoder reads them: the IoU of
the masks, and the mean difference of a channel where both see the object. Prints a table; --write also writes it to
benchmarks/results/rendered-pictures-{cpu,cuda}.md.
"""

import argparse
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from d3ds2.images.foreground import preprocess  # noqa: E402
from d3ds2.images.render import Camera, Light, MeshRenderer  # noqa: E402
from d3ds2.images.srgb import to_linear  # noqa: E402
from d3ds2.kernels.devices import abilities, find_device  # noqa: E402
from d3ds2.meshes.mesh_to_sdf import normalize_mesh  # noqa: E402
from training.config import load_config  # noqa: E402
from training.data.datasets import Choice  # noqa: E402
from training.data.meshes import list_meshes, read_textured_mesh  # noqa: E402
from training.data.rendered_pictures import RenderedPictures, RenderedPicturesConfig, SidesOfShapes  # noqa: E402
from training.data.surfel_rendering import look, shade, shots_of  # noqa: E402
from training.data.surfels import NORMAL_STEPS, POINT_STEPS, sample_surfels, surfels_path, write_surfels  # noqa: E402
from training.render_views import Colors, RenderViewsConfig, paint, random_camera, random_light  # noqa: E402

VIEWS = load_config(RenderViewsConfig, [str(ROOT / "training/configs/tiny_views.toml")])
SURFELS, SIZE, TIMES = 131072, 224, 5


class Traced:
    """A mesh, its surfels, and a picture of the ray tracer."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, colors: Colors, rng: np.random.Generator):
        """Take a mesh as `read_textured_mesh` returns it: (V,3), (F,3); draw surfels, camera and light."""
        vertices = normalize_mesh(vertices)
        self.renderer, self.colors = MeshRenderer(vertices, faces), colors
        self.surfels = sample_surfels(vertices, faces, colors, SURFELS, rng)
        self.camera: Camera = random_camera(VIEWS, rng)
        self.light: Light = random_light(VIEWS, self.camera, rng)

    def seconds(self, rng: np.random.Generator) -> float:
        """Trace the picture, and return the seconds it took."""
        start = time.perf_counter()
        paint(self.renderer, self.colors, 0.0, rng)
        self.picture = self.renderer.render(self.camera, VIEWS.size, self.light, VIEWS.supersample)
        return time.perf_counter() - start

    def difference(self, device: torch.device) -> tuple[float, float]:
        """Return the IoU of the masks, and the mean difference of a channel; NaN for a mesh without colours."""
        wanted = preprocess(Image.fromarray(self.picture), SIZE)
        shots = shots_of([self.camera], [self.light], device)
        points = torch.from_numpy(self.surfels.points).to(device)[None] / POINT_STEPS
        seen = look(points, shots, SIZE)
        normals = torch.from_numpy(self.surfels.normals).to(device)[seen.point] / NORMAL_STEPS
        linear = torch.from_numpy(to_linear(self.surfels.colors)).to(device)
        colors = linear[seen.point] if len(linear) else torch.ones(1, 1, 3, device=device)
        made = shade(seen, normals, colors, points, shots)[0].cpu()
        one, two = made[3] > 0.5, wanted[3] > 0.5
        change = (made - wanted)[:3, one & two].abs().mean().item()
        return ((one & two).sum() / (one | two).sum()).item(), change if len(linear) else float("nan")


def device_seconds(shapes: list[Traced], folder: Path, batch: int, device: torch.device) -> list[float]:
    """Return the seconds of some batches of rendered pictures, after one that does not count."""
    surfels_path(folder, "").parent.mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}" for number in range(len(shapes))]
    for name, shape in zip(names, shapes, strict=True):
        write_surfels(surfels_path(folder, name), shape.surfels, {})
    pictures = RenderedPictures(SidesOfShapes(str(folder), names, SIZE), RenderedPicturesConfig(), device)
    number, nothing = torch.arange(batch, device=device), torch.zeros(batch, device=device)
    choice = Choice(number % len(shapes), number % 8, nothing.long(), nothing.bool())
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        pictures.draw(choice, generator).images.sum().item()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("meshes")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--batch", type=int, default=256, help="pictures rendered at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=ROOT / "data" / "rendered_pictures")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    device, rng = find_device(arguments.device), np.random.default_rng(0)
    entries = [entry for entry in list_meshes(arguments.meshes) if entry.split == "train"]
    chosen = entries[:: max(1, len(entries) // arguments.count)][: arguments.count]
    shapes = [Traced(*read_textured_mesh(entry), rng) for entry in chosen]
    for shape in shapes:
        shape.seconds(rng)
    traced = [shape.seconds(rng) for shape in shapes]
    rendered = [s / arguments.batch for s in device_seconds(shapes, arguments.work, arguments.batch, device)]
    overlap, change = np.array([shape.difference(device) for shape in shapes]).T
    ratio = statistics.median(traced) / statistics.median(rendered)
    about = f"{date.today()}, {abilities(device).name}, torch {torch.__version__}, {len(shapes)} meshes, batches of "
    lines = [
        f"# Pictures rendered of surfels\n\n{about}{arguments.batch}. `python benchmarks/rendered_pictures.py MESHES`",
        "\n| | ms a picture, median | range |\n|---|---|---|",
        *(
            f"| {name} | {1e3 * statistics.median(s):.2f} | {1e3 * min(s):.2f} to {1e3 * max(s):.2f} |"
            for name, s in (("ray tracer, one process", traced), (f"surfels, {device.type}", rendered))
        ),
        f"\n{ratio:.1f} times as fast as one process. Against the ray tracer: IoU of masks {overlap.mean():.3f}, mean "
        f"difference of a channel {np.nanmean(change):.4f} "
        f"({np.isfinite(change).sum()} meshes with colours).",
    ]
    print("\n".join(lines))
    if arguments.write:
        (ROOT / "benchmarks" / "results" / f"rendered-pictures-{device.type}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

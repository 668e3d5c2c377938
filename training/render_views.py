"""Meshes -> pictures: RGBA views from random cameras, as data for the image-conditioned networks.

    python -m training.render_views training/configs/tiny_views.toml meshes=my_meshes data_dir=data/mine

Reads the same folder of meshes as prepare_shapes and writes, for each mesh,

    data_dir/views/<name>/000.png ...     RGBA, straight alpha
    data_dir/views/<name>/000_points.png ...   with `points`: where in space each pixel sees the mesh, see point_maps.py
    data_dir/views/<name>/cameras.json    the settings, and camera and light of each view
    data_dir/view_failures.jsonl          meshes that could not be read or rendered, and why

A view depends on (seed, split, name, number) alone. Existing folders of the same mesh and settings are kept, so a
stopped run continues where it was. One process per core. Needs embreex (extra `train`). `shard=i/n` does the i-th of n
parts, as a task of an array (docs/cluster.md), and writes view_failures.<i>-of-<n>.jsonl. Exit code 1: no mesh could be
rendered, or the disk refused a file.

Marks such as [A] say how certain a value is: see docs/paper.md.
"""

import colorsys
import dataclasses
import io
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from d3ds2.images.render import Camera, Light, MeshRenderer
from d3ds2.images.surface_colors import SurfaceColors
from d3ds2.meshes.mesh_to_sdf import normalize_mesh
from training.command import run_command
from training.data.meshes import SPLITS, MeshEntry, check_source, choose_meshes, read_mesh, read_textured_mesh
from training.data.named_generators import generator_of
from training.data.packs import open_data
from training.data.png_files import is_whole
from training.data.point_maps import encode_points, point_map_of
from training.data.shape_files import view_folder
from training.data.shards import Shard
from training.data.surfels import is_colored
from training.data.view_ranges import GAMMA, RANGE, check_view_ranges
from training.mesh_jobs import AllFailedError, check_engine, finished, run_engine

MIN_COVERAGE = 2e-3  # share of the pixels; a sheet seen edge-on has less, and gets another camera
TRIES = 20  # cameras for a view
Colors = SurfaceColors | np.ndarray | None  # of all points, of the faces, or none


@dataclass(frozen=True)
class RenderViewsConfig:
    meshes: str = "meshes"
    data_dir: str = "data"
    views: int = 45  # per mesh [A]
    size: int = 1024  # pixels per edge [A]
    elevation: RANGE = (10.0, 40.0)  # degrees [A]
    azimuth: RANGE = (-90.0, 90.0)  # degrees from the front; the paper: 0-180 in its own axes [C]
    splits: tuple[str, ...] = SPLITS  # whose meshes are rendered
    focal_mm: RANGE = (30.0, 100.0)  # for a sensor of 36 mm [A]
    light_elevation: RANGE = (20.0, 80.0)  # degrees, of the key light [D]
    light_azimuth: RANGE = (-75.0, 75.0)  # degrees from the camera's [D]
    light_key: RANGE = (0.5, 0.95)  # intensity of the key light; 1: a white face toward it is white [D]
    light_fill: RANGE = (0.05, 0.2)  # of the light at the camera [D]
    light_sky: RANGE = (0.25, 0.45)  # of the ambient light from above [D]
    light_ground: RANGE = (0.08, 0.2)  # of the ambient light from below [D]
    light_tint: float = 0.0  # largest relative change of a colour channel of the key light, and of all other light [D]
    shadows: float = 0.5  # probability that the key light casts shadows [D]
    textures: bool = False  # draw textures and colours of vertices; else each face has one colour
    color_jitter: float = 0.1  # largest relative change of a colour channel [D]
    supersample: int = 2  # rays per pixel edge, at contours
    points: int = 0  # pixels per edge of a point map beside each picture; 0: none [D]
    scale: float = 0.95  # as in prepare_shapes
    seed: int = 0
    source: str = ""  # corpus, folder, objaverse, objaverse-xl or shapenet; "": seen from the files in `meshes`
    names: str = ""  # file with the names of the meshes to take, one on each line; "": all
    deformed: int = 0  # as in prepare_shapes
    engine: str = "processes"  # of this machine; or "ray": a running Ray cluster (docs/cluster.md)
    workers: int = 0  # processes of this machine; 0: one per core
    limit: int = 0  # only the first meshes; 0: all
    shard: str = "0/1"  # the part i/n of the meshes that this task renders
    verify: bool = False  # read existing pictures and compare them with their checksums

    def __post_init__(self):
        Shard.parse(self.shard)
        check_engine(self.engine)
        check_source(self.source)
        if self.views < 1 or self.size < 8:
            raise ValueError(f"expected views >= 1 and size >= 8, got {self.views} and {self.size}")
        if self.points < 0:
            raise ValueError(f"expected points >= 0, got {self.points}")
        if not set(self.splits) <= set(SPLITS):
            raise ValueError(f"expected splits out of {SPLITS}, got {self.splits}")
        check_view_ranges(self)

    @property
    def settings(self) -> dict:
        """The settings that the pictures depend on, as in cameras.json."""
        chosen = ("meshes", "source", "names", "splits", "deformed", "limit", "shard")  # which meshes, not how
        elsewhere = (*chosen, "data_dir", "engine", "workers", "verify")
        return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(self).items() if k not in elsewhere}))


def generator_for(seed: int, split: str, name: str, view: int) -> np.random.Generator:
    """Return the random generator of a view, which no other split, mesh or view shares."""
    return generator_of(f"{seed}/{split}/{name}/{view}")


def random_camera(config: RenderViewsConfig, rng: np.random.Generator) -> Camera:
    """Draw a camera within the ranges of the config."""
    return Camera(rng.uniform(*config.elevation), rng.uniform(*config.azimuth), rng.uniform(*config.focal_mm))


def random_light(config: RenderViewsConfig, camera: Camera, rng: np.random.Generator) -> Light:
    """Draw a key light and the other light within the ranges of the config."""
    light = Light(
        elevation=rng.uniform(*config.light_elevation),
        azimuth=camera.azimuth + rng.uniform(*config.light_azimuth),
        key=rng.uniform(*config.light_key),
        fill=rng.uniform(*config.light_fill),
        sky=rng.uniform(*config.light_sky),
        ground=rng.uniform(*config.light_ground),
        shadows=rng.uniform() < config.shadows,
    )
    if not config.light_tint:
        return light  # and draw nothing more: older pictures stay the same
    tint = config.light_tint
    key, ambient = (tuple(rng.uniform(1 - tint, 1 + tint, size=3).tolist()) for _ in range(2))
    return dataclasses.replace(light, key_color=key, ambient_color=ambient)


def random_colors(colors: np.ndarray | None, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """Shift a mesh's own colours slightly, or draw one colour if it has none: (F,3) or (1,3) uint8.

    The same grey on all faces counts as no colour.
    """
    if colors is not None and is_colored(colors):
        return np.clip(colors * rng.uniform(1 - jitter, 1 + jitter, size=3), 0, 255).astype(np.uint8)
    saturation = rng.beta(1, 2.5)  # mostly muted, like paint, wood and stone
    color = colorsys.hsv_to_rgb(rng.uniform(), saturation, rng.uniform(0.35, 0.95))
    return np.round(np.array([color]) * 255).astype(np.uint8)


def paint(renderer: MeshRenderer, colors: Colors, jitter: float, rng: np.random.Generator) -> None:
    """Give the mesh of a renderer its own colours, slightly shifted, or one random colour if it has none."""
    if isinstance(colors, SurfaceColors):
        renderer.set_surface(colors, rng.uniform(1 - jitter, 1 + jitter, size=3) ** GAMMA)
    else:
        renderer.set_colors(random_colors(colors, jitter, rng))


def render_view(
    renderer: MeshRenderer, colors: Colors, config: RenderViewsConfig, rng: np.random.Generator
) -> tuple[np.ndarray, Camera, Light]:
    """Render a random view; return the picture (size, size, 4) uint8, its camera and its light.

    Raises:
        ValueError: no camera tried sees enough of the mesh.
    """
    for _ in range(TRIES):
        camera = random_camera(config, rng)
        light = random_light(config, camera, rng)
        paint(renderer, colors, config.color_jitter, rng)
        picture = renderer.render(camera, config.size, light, config.supersample)
        if (picture[..., 3] > 0).mean() >= MIN_COVERAGE:
            return picture, camera, light
    raise ValueError(f"expected a mesh that covers {MIN_COVERAGE:.1%} of a picture, got none in {TRIES} tries")


def render_mesh(entry: MeshEntry, config: RenderViewsConfig) -> int:
    """Write all views of a mesh, unless they exist; return the number of views rendered.

    Raises:
        ValueError: the mesh cannot be read or seen.
        OSError: a file cannot be read or written.
    """
    folder = view_folder(config.data_dir, entry.name)
    size = entry.path.stat().st_size if entry.path.is_file() else None
    if is_complete(folder, config, size):
        return 0
    vertices, faces, colors = (read_textured_mesh if config.textures else read_mesh)(entry)
    renderer = MeshRenderer(normalize_mesh(vertices, config.scale), faces)
    partial = folder.with_name(f".{entry.name}.{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        views = []
        for number in range(config.views):
            rng = generator_for(config.seed, entry.split, entry.name, number)
            picture, camera, light = render_view(renderer, colors, config, rng)
            file = f"{number:03d}.png"
            about = {"file": file, "bytes": _write_png(partial / file, picture)}
            if config.points:
                points = encode_points(renderer.points(camera, config.points))
                about["point_map_bytes"] = _write_png(point_map_of(partial / file), points)
            views.append(about | {"camera": dataclasses.asdict(camera), "light": dataclasses.asdict(light)})
        cameras = {"settings": config.settings, "mesh_bytes": size, "views": views}
        _write(partial / "cameras.json", json.dumps(cameras).encode())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)  # so a killed run leaves no unfinished folder under this name
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config.views


def _write_png(path: Path, picture: np.ndarray) -> int:
    """Write a picture (H, W, 4) uint8; return the bytes of the file."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG", compress_level=1)
    _write(path, png.getvalue())
    return len(png.getvalue())


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise


def is_complete(folder: Path, config: RenderViewsConfig, mesh_bytes: int | None = None) -> bool:
    """Whether the folder holds all views, made with these settings from a mesh file of this size.

    A setting that an older version did not have counts as its default, which changes no picture. Pictures are compared
    with their sizes in cameras.json, and with their own checksums if the config says `verify`.
    """
    try:
        cameras = json.loads((folder / "cameras.json").read_text())
        settings = type(config)().settings | cameras["settings"]
        if settings != config.settings or mesh_bytes not in (None, cameras.get("mesh_bytes", mesh_bytes)):
            return False
        for view in cameras["views"]:
            file = folder / view["file"]
            files = {file: view.get("bytes")}
            if config.points:
                files[point_map_of(file)] = view["point_map_bytes"]
            if not all(_is_whole(*each, config.verify) for each in files.items()):
                return False
        return True
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_whole(file: Path, size: int | None, verify: bool) -> bool:
    """Whether a picture is there, has this size if it is known, and matches its own checksums if they are compared."""
    if not file.is_file() or (size is not None and file.stat().st_size != size):
        return False
    return not verify or is_whole(file.read_bytes())


def clear_unfinished(views: Path, names: set[str]) -> None:
    """Delete the unfinished folders of these meshes, which no other task renders."""
    for folder in views.glob(".*"):
        if folder.name[1:].rpartition(".")[0] in names:
            shutil.rmtree(folder, ignore_errors=True)


def main(config: RenderViewsConfig) -> list[dict]:
    """Render this task's meshes; return the records of view_failures.jsonl.

    Raises:
        FileNotFoundError: there is no such folder of meshes.
        ValueError: no mesh belongs to these splits, or `data_dir` is packed.
        AllFailedError: no mesh could be rendered.
        MachineError: the disk is full or cannot be written. Finished pictures stay.
    """
    data_dir, shard = Path(open_data(config.data_dir)), Shard.parse(config.shard)
    _, entries = choose_meshes(config, config.splits, deformed=config.deformed)
    views = data_dir / "views"
    views.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in entries}
    clear_unfinished(views, names)  # of a killed run
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the workers: each core has its own mesh
    jobs = run_engine(render_mesh, entries, config)
    log = shard.file(data_dir / "view_failures.jsonl")
    failed = []
    rendered = sum(number for _, number in finished(jobs, len(entries), log, failed))
    clear_unfinished(views, names)  # of processes that died
    print(f"{rendered} views rendered in {views}, {len(failed)} meshes failed (see {log})")
    if entries and len(failed) == len(entries):
        raise AllFailedError(f"all {len(failed)} meshes failed, see {log}")
    return failed


if __name__ == "__main__":
    run_command(main, RenderViewsConfig)

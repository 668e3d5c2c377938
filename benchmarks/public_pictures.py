"""A contact sheet of what a model makes of public example pictures: the meshes alone, from two sides each.

    git clone https://github.com/microsoft/TRELLIS pictures/TRELLIS        # and others
    python benchmarks/public_pictures.py pictures --out OUT [--model FOLDER] [--count 24] [--seed 0]

Draws pictures from all that lie in `pictures` and its folders, makes a mesh of each, and writes
OUT/<folders>_<picture>.glb, OUT/public-pictures.png, and OUT/public-pictures.md: a table of where each picture lies,
with an empty column for a person to say what the mesh looks like. The pictures themselves are not in the sheet. A mesh
that is already there is kept, so a stopped run goes on where it was. A picture that cannot be used is named in its row.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import d3ds2  # noqa: E402
from d3ds2.generation_error import GenerationError  # noqa: E402
from d3ds2.images.contact_sheet import contact_sheet  # noqa: E402
from d3ds2.images.image_file import ImageError  # noqa: E402
from d3ds2.images.mesh_pictures import draw_sides  # noqa: E402

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
EXAMPLES = "example"  # in the name of a folder whose pictures are inputs, not figures or results
SIZE, AZIMUTH = 240, 30.0  # of a picture of a mesh: pixels, degrees
SHAPES_PER_ROW = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="model folder; default: the shipped one")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = draw(arguments.pictures, arguments.count, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipeline = d3ds2.load_pipeline(arguments.model)
    made: list[Path | str] = []
    for picture in chosen:
        where = picture.relative_to(arguments.pictures)
        made.append(mesh_of(pipeline, picture, arguments.out / f"{'_'.join(where.parts)}.glb"))
        print(f"{where}: {made[-1]}", flush=True)
    sheet(chosen, made).save(arguments.out / "public-pictures.png")
    lines = ["| | picture | mesh |", "|---|---|---|"]
    for number, (picture, mesh) in enumerate(zip(chosen, made, strict=True), 1):
        where, problem = picture.relative_to(arguments.pictures), mesh if isinstance(mesh, str) else ""
        lines.append(f"| {number} | {where} | {problem} |")
    (arguments.out / "public-pictures.md").write_text("\n".join(lines) + "\n")


def draw(folder: Path, count: int, seed: int) -> list[Path]:
    """Return some of the example pictures below a folder, drawn by the seed, sorted by name."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    found = sorted(path for path in found if any(EXAMPLES in part for part in path.relative_to(folder).parts[:-1]))
    if len(found) < count:
        sys.exit(f"expected {count} pictures in folders named *{EXAMPLES}* below {folder}, got {len(found)}")
    return sorted(found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count])


def mesh_of(pipeline: d3ds2.Pipeline, picture: Path, output: Path) -> Path | str:
    """Make the mesh of a picture unless it is there; return its file, or why there is none."""
    if not output.is_file():
        try:
            d3ds2.save_mesh(output, pipeline.generate(d3ds2.load_image(picture), seed=0))
        except (ImageError, GenerationError) as error:
            return str(error)
    return output


def sheet(pictures: list[Path], meshes: list[Path | str]) -> Image.Image:
    """Lay out the meshes, each from two sides, with the numbers of the table and the names of the pictures."""
    captions = [f"{number} {picture.stem}" for number, picture in enumerate(pictures, 1)]
    starts = range(0, len(meshes), SHAPES_PER_ROW)
    rows = [[side for mesh in meshes[i : i + SHAPES_PER_ROW] for side in sides(mesh)] for i in starts]
    return contact_sheet(rows, captions=[captions[i : i + SHAPES_PER_ROW] for i in starts], cell=SIZE)


def sides(mesh: Path | str) -> list[np.ndarray | None]:
    """Render a mesh from the front and from behind."""
    if isinstance(mesh, str):
        return [None, None]
    loaded = trimesh.load_mesh(mesh)
    pictures = draw_sides(loaded.vertices, loaded.faces, SIZE, sides=2, azimuth=AZIMUTH)
    return [(picture.image * 255).round().astype(np.uint8) for picture in pictures]


if __name__ == "__main__":
    main()

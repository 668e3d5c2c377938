"""One picture -> one watertight mesh, with the shipped model `tiny`.

    python docs/examples/image_to_mesh.py picture.png mesh.glb [steps]

The picture shows one object, with alpha or on a plain background.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run from a clone, nothing installed

import d3ds2


def main(picture: str, output: str, steps: str | None = None) -> None:
    pipeline = d3ds2.load_pipeline()
    count = None if steps is None else int(steps)
    image = d3ds2.load_image(picture)
    mesh = pipeline.generate(image, seed=0, structure_steps=count, latent_steps=count)
    d3ds2.save_mesh(output, mesh)
    print(f"{output}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces")


if __name__ == "__main__":
    main(*sys.argv[1:])

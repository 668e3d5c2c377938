"""Any mesh -> a signed distance field -> a watertight mesh, without any network.

python docs/examples/mesh_to_sdf_and_back.py broken.obj watertight.glb [resolution]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run from a clone, nothing installed

import d3ds2


def main(source: str, output: str, resolution: str = "256") -> None:
    with open(source, "rb") as file:
        mesh = d3ds2.read_mesh(file, Path(source).suffix.lower())
    vertices = d3ds2.normalize_mesh(mesh.vertices)  # into [-1, 1]³
    sdf = d3ds2.mesh_to_sdf(vertices, mesh.faces, int(resolution))
    print(f"{len(sdf.block_coords):,} blocks of 8³ voxels hold the surface")
    closed = d3ds2.sdf_to_mesh(sdf.block_coords, sdf.values, sdf.resolution)
    d3ds2.save_mesh(output, closed)
    print(f"{output}: {len(closed.vertices):,} vertices, {len(closed.faces):,} faces")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Direct3D-S2: one image in, one watertight mesh out.

    import d3ds2
    pipeline = d3ds2.load_pipeline()
    d3ds2.save_mesh("chair.glb", pipeline.generate(d3ds2.load_image("chair.png"), seed=0))

Importing the package imports nothing else: a name brings its module when it is first used.
"""

from importlib import import_module

_MODULES = {
    "load_pipeline": "pipeline",
    "build_pipeline": "pipeline",
    "Pipeline": "pipeline",
    "Stage": "stage",
    "load_image": "images.image_file",
    "cut_out": "images.foreground",
    "Mesh": "meshes.mesh",
    "read_mesh": "meshes.mesh_file",
    "save_mesh": "meshes.mesh_file",
    "normalize_mesh": "meshes.mesh_to_sdf",
    "mesh_to_sdf": "meshes.mesh_to_sdf",
    "sdf_to_mesh": "meshes.sdf_to_mesh",
    "Voxels": "geometry.voxels",
    "SpatialSparseAttention": "layers.spatial_sparse_attention",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

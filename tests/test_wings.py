"""Which wing may import which: imports go down the wings, never back up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NETWORKS = ("networks", "layers", "geometry", "kernels")
MAY_IMPORT = {  # a wing: the others it may import; d3ds2 means the modules at its top, such as pipeline
    "d3ds2/kernels": (),
    "d3ds2/geometry": ("kernels",),
    "d3ds2/layers": ("geometry", "kernels"),
    "d3ds2/networks": NETWORKS,
    "d3ds2/storage": (),
    "d3ds2/meshes": ("storage",),
    "d3ds2/images": (),
    "d3ds2/official": (*NETWORKS, "storage"),
    "d3ds2": (*NETWORKS, "storage", "meshes", "images", "official"),
    "nodes": (*NETWORKS, "storage", "meshes", "images", "d3ds2"),
    "training": (*NETWORKS, "storage", "meshes", "images", "d3ds2"),
    "benchmarks": (*NETWORKS, "storage", "meshes", "images", "d3ds2", "training", "tests"),
}


def wing_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] == "d3ds2" and len(parts) > 2 else parts[0]


def imported_wings(path: Path) -> list[tuple[int, str]]:
    """Line and wing of every import of the project's own, also of those inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "d3ds2":
                inside = len(name) > 1 and (ROOT / "d3ds2" / name[1]).is_dir()
                found.append((node.lineno, name[1] if inside else "d3ds2"))
            elif name[0] in ("nodes", "training", "benchmarks", "tests"):
                found.append((node.lineno, name[0]))
    return found


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_imports_only_from_the_wings_below_it(wing):
    own = wing.split("/")[-1]
    modules = [path for path in sorted((ROOT / wing).rglob("*.py")) if wing_of(path) == wing]
    assert modules
    climbing = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in modules
        for line, other in imported_wings(path)
        if other not in (own, *MAY_IMPORT[wing])
    ]
    assert not climbing, "\n".join(climbing)


def test_every_module_lies_in_a_wing():
    modules = [path for top in ("d3ds2", "nodes", "training", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    assert {wing_of(path) for path in modules} == set(MAY_IMPORT)

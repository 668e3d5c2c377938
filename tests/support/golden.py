"""Read golden tensors of the official modules, from $D3DS2_PARITY, else ../shared/parity, else tests/data/parity."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests" / "data" / "parity"  # the part of the collection that is in the repository


def parity_folder() -> Path:
    """Return the folder to read.

    Raises:
        FileNotFoundError: if D3DS2_PARITY names no folder; the tests must not pass by skipping.
    """
    if named := os.environ.get("D3DS2_PARITY"):
        if not Path(named).is_dir():
            raise FileNotFoundError(f"D3DS2_PARITY names {named}, which is not a folder")
        return Path(named)
    shared = ROOT.parent / "shared" / "parity"
    return shared if shared.is_dir() else SMALL


@dataclass
class Golden:
    """A parity file: its sidecar `meta` and its tensors by kind. Parameters are float32."""

    name: str
    meta: dict
    params: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inter: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> dict:
        return self.meta["config"]

    def tolerance(self, key: str, least: float) -> float:
        """Return `least`, or more if the sidecar says that float32 rounding alone comes near it."""
        entry = self.meta.get("tolerance", {}).get(key)
        return max(least, 4 * entry["err_over_rms"]) if isinstance(entry, dict) and "err_over_rms" in entry else least


def available(*patterns: str, holding: str = "") -> list[str]:
    """List the parity files that match a glob pattern and hold a tensor whose name begins with `holding`."""
    folder = parity_folder()
    paths = sorted({path for pattern in patterns for path in folder.glob(f"{pattern}.safetensors")})
    return [path.stem for path in paths if any(key.startswith(holding) for key in keys_of(path))]


def keys_of(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def over(*patterns: str, holding: str = "") -> Callable:
    """Run a test once for each of these files, as its argument `name`. If there are none, remove the test.

    The repository holds only some of the files (data/parity/README.md). test_parity_files.py checks that these exist.
    """
    names = available(*patterns, holding=holding)
    return pytest.mark.parametrize("name", names) if names else lambda _test: None


def beside(name: str, part: str) -> str:
    """Return the companion of a file. For "_grads": `ssa_v10` -> `ssa_v10_grads`, `ssa_v10_b` -> `ssa_v10_grads_b`."""
    stem, _, rest = name.partition("_v1")
    candidates = [f"{name}{part}", f"{stem}_v1{rest[:1]}{part}{rest[1:]}"]
    return next(found for found in candidates if found in available(found))


def golden(name: str) -> Golden:
    folder = parity_folder()
    data = Golden(name, json.loads((folder / f"{name}.json").read_text()))
    for key, tensor in load_file(folder / f"{name}.safetensors").items():
        kind, _, rest = key.partition("/")
        getattr(data, kind)[rest] = tensor.float() if kind == "params" else tensor
    if not data.params and "param_recipe" in data.meta:
        data.params = recipe_parameters(data.meta)
    return data


def recipe_parameters(meta: dict) -> dict[str, Tensor]:
    """Make the parameters of `param_recipe`.

    The generator is splitmix64, seeded by SHA-256 of "<seed>/<key>" (parity README, section 2).
    """
    return {
        key: recipe_tensor(f"{meta['seed']}/{key}", entry["shape"], entry["bound"], entry["offset"])
        for key, entry in meta["param_recipe"].items()
    }


def recipe_tensor(seed: str, shape: list[int], bound: float, offset: float) -> Tensor:
    k0 = np.frombuffer(hashlib.sha256(seed.encode("ascii")).digest()[:8], dtype="<u8")[0]
    with np.errstate(over="ignore"):
        z = k0 + np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    values = (unit * np.float32(bound) + np.float32(offset)).astype(np.float16).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


def released_shapes(version: str, file: str, part: str) -> dict[str, list[int]]:
    """Return the shape of each tensor of a released network, by key.

    In the file, `blocks.[0..23].x` stands for blocks.0.x to blocks.23.x. A parity folder without the file uses the
    repository's, because there is only one release.
    """
    files = [folder / "released_keys.json" for folder in (parity_folder(), SMALL)]
    versions = json.loads(next(file for file in files if file.is_file()).read_text())["versions"]
    released, shapes = versions[version][file][part], {}
    if "same_as" in released:
        return released_shapes(released["same_as"], file, part)
    for key, (_, *shape) in released["state_dict"].items():
        span = re.search(r"\[(\d+)\.\.(\d+)\]", key)
        numbers = range(int(span[1]), int(span[2]) + 1) if span else [0]
        shapes |= {key.replace(span[0], str(i)) if span else key: shape for i in numbers}
    assert len(shapes) == released["num_keys"]
    return shapes


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Check the largest error divided by the rms of the expected values, as the parity README measures it."""
    assert actual.shape == expected.shape, f"{name}: got {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    rms = expected.double().square().mean().sqrt().clamp(min=1e-30)
    error = ((actual.double() - expected.double()).abs().max() / rms).item()
    assert error <= tolerance, f"{name}: error / rms {error:.2e} > {tolerance:.0e}"

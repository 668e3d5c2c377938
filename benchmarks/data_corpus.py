"""The data that benchmarks/data.py measures: real shapes, and the tables of half a million that do not exist."""

import json
import shutil
from pathlib import Path

import numpy as np

from training.data.array_files import write_arrays
from training.data.cameras import TABLE, Table
from training.data.packs import COLUMNS, ENTRIES, FORMAT, MANIFEST, key_of
from training.data.shape_files import latent_path, list_records, load_shape, shape_path
from training.data.symmetry import NUM_SYMMETRIES
from training.pack import PackConfig
from training.pack import main as pack
from training.prepare_shapes import PrepareShapesConfig
from training.prepare_shapes import main as prepare_shapes
from training.render_views import RenderViewsConfig
from training.render_views import main as render_views

COUNT = 500_000
VIEWS = 24
TOKENS = {256: 2058, 384: 5510, 512: 10655, 1024: 45904}  # of a shape on average [A]
CHANNELS = 16


def prepare(meshes: str, work: Path) -> None:
    """Prepare real shapes and pictures, unless they exist."""
    for R, limit in ((64, 2000), (256, 240)):
        if not (work / f"real{R}" / "index.json").is_file():
            prepare_shapes(PrepareShapesConfig(meshes, str(work / f"real{R}"), (R,), limit=limit))
    config = RenderViewsConfig(meshes, str(work / "real256"), views=2, size=1024, supersample=1, limit=24)
    render_views(config)


def make_latents(data_dir: Path, packed: Path) -> None:
    """Write latents drawn at random at 256, and at 512 with the paper's number of tokens; pack all of the folder."""
    rng, records = np.random.default_rng(0), list_records(data_dir, "train", 256)
    records = [record for record in records if (data_dir / "views" / record["name"]).is_dir()]
    for record in records:
        record["num_tokens"]["512"] = TOKENS[512]
        for R in (256, 512):
            for symmetry in range(NUM_SYMMETRIES):
                path = latent_path(data_dir, R, record["name"], symmetry)
                if path.is_file():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                coords = load_shape(shape_path(data_dir, 256, record["name"]), symmetry).block_coords
                coords = np.resize(coords, (record["num_tokens"][str(R)], 3))
                mean, logvar = rng.normal(size=(2, len(coords), CHANNELS)).astype(np.float16)
                write_arrays(path, {"coords": coords, "mean": mean, "logvar": logvar})
    (data_dir / "index.512-of-513.json").write_text(json.dumps(records))
    shutil.rmtree(packed, ignore_errors=True)
    pack(PackConfig(str(data_dir), str(packed)))


def make_half_a_million(folder: Path) -> Path:
    """Write the index and the tables of a pack of COUNT shapes; every latent is the same one."""
    if (folder / MANIFEST).is_file():
        return folder
    rng, names = (
        np.random.default_rng(0),
        [f"objaverse__{i // 1000:03d}__{i * 2654435761 % 2**64:016x}" for i in range(COUNT)],
    )
    tokens = {R: np.exp(rng.normal(np.log(mean), 0.6, COUNT)).astype(int) + 1 for R, mean in TOKENS.items()}
    records = [
        {
            "name": name,
            "source": "objaverse",
            "split": "train" if i % 100 else "val",
            "num_tokens": {str(R): int(tokens[R][i]) for R in TOKENS},
            "checksums": {str(R): f"{(i * 7919 + R) % 2**32:08x}" for R in TOKENS},
            "meshes": "/data/objaverse",
        }
        for i, name in enumerate(names)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").write_text(json.dumps(records, indent=1))
    files = [f"{i:03d}.png" for i in range(VIEWS)]
    turns = rng.integers(4, size=(COUNT, VIEWS))
    Table.of([(name, files, turns[i].tolist(), (1, 1)) for i, name in enumerate(names)]).write(folder / TABLE)
    folders = {f"shapes/{R}": [f"{name}.safetensors" for name in names] for R in TOKENS}
    folders["latents/512"] = [f"{name}@{s}.safetensors" for name in names for s in range(NUM_SYMMETRIES)]
    folders["views"] = [f"{name}/{file}" for name in names for file in files]
    for place, inside in folders.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        keys = np.sort(np.array([key_of(f"{place}/{file}") for file in inside], dtype=np.uint64))
        ones = np.ones(len(keys), dtype=np.uint32)
        columns = keys, 0 * ones, np.zeros(len(keys), dtype=np.uint64), ones * latent_bytes(folder / place)
        write_arrays(folder / place / ENTRIES, dict(zip(COLUMNS, columns, strict=True)))
    (folder / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "folders": [*folders], "files": ["index.json", TABLE]})
    )
    return folder


def latent_bytes(folder: Path) -> int:
    """Write one file of latents as the only tar of a folder; return its size."""
    latents = np.zeros((TOKENS[512], CHANNELS), dtype=np.float16)
    coords = np.zeros((TOKENS[512], 3), dtype=np.int16)
    write_arrays(folder / "00000.tar", {"coords": coords, "mean": latents, "logvar": latents})
    return (folder / "00000.tar").stat().st_size

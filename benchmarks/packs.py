"""Reading shapes at random: a folder of files, a pack of `training.pack`, and the same bytes in chunks of litdata.

    pip install litdata
    python benchmarks/packs.py DATA_DIR [--resolution 64]

Each reads the same files in the same random order, whole, in one process, `ROUNDS` times in turn. litdata stores each
file as one item of bytes, in chunks of 64 MiB, and `StreamingDataset[i]` reads an item. Prints a table, and writes
benchmarks/results/packs.md.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.data.index_files import read_index  # noqa: E402
from training.data.packs import open_data  # noqa: E402
from training.data.shape_files import shape_path  # noqa: E402
from training.pack import PackConfig  # noqa: E402
from training.pack import main as pack  # noqa: E402

ROUNDS = 3
CHUNK_MIB = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--resolution", type=int, default=64)
    arguments = parser.parse_args()
    names = [record["name"] for record in read_index(arguments.data_dir)]
    order = np.random.default_rng(0).permutation(len(names))
    with tempfile.TemporaryDirectory() as folder:
        readers, sizes = {}, {}
        for kind, make in (("folder", in_folder), ("training.pack", in_pack), ("litdata", in_litdata)):
            began = time.perf_counter()
            readers[kind], sizes[kind] = make(arguments.data_dir, arguments.resolution, names, Path(folder))
            print(f"{kind}: made in {time.perf_counter() - began:.1f} s", flush=True)
        text = report(names, order, readers, sizes)
    print(text)
    (ROOT / "benchmarks" / "results" / "packs.md").write_text(text)


def in_folder(data_dir: str, resolution: int, names: list[str], _out: Path) -> tuple[Callable[[int], bytes], int]:
    """Read the files where they are."""
    paths = [shape_path(data_dir, resolution, name) for name in names]
    return lambda i: paths[i].read_bytes(), sum(path.stat().st_size for path in paths)


def in_pack(data_dir: str, resolution: int, names: list[str], out: Path) -> tuple[Callable[[int], bytes], int]:
    """Pack the folder and read from the pack."""
    pack(PackConfig(data_dir, str(out / "packed")))
    opened = open_data(str(out / "packed"))
    paths = [shape_path(opened, resolution, name) for name in names]
    return lambda i: paths[i].read_bytes(), size_of(out / "packed")


def in_litdata(data_dir: str, resolution: int, names: list[str], out: Path) -> tuple[Callable[[int], bytes], int]:
    """Write the files as items of litdata's chunks and read these."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    chunks = out / "litdata"
    writer = BinaryWriter(str(chunks), chunk_bytes=CHUNK_MIB << 20)
    for i, name in enumerate(names):
        writer[i] = {"file": shape_path(data_dir, resolution, name).read_bytes()}
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(chunks), shuffle=False)
    return lambda i: dataset[i]["file"], size_of(chunks)


def size_of(folder: Path) -> int:
    """Sum the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(names: list[str], order: np.ndarray, readers: dict[str, Callable], sizes: dict[str, int]) -> str:
    """Read everything in turn; return the table. `order` (n,) holds the places of the names."""
    expected = [readers["folder"](int(i)) for i in order[:100]]
    seconds: dict[str, list[float]] = {kind: [] for kind in readers}
    for kind, read in readers.items():
        if [read(int(i)) for i in order[:100]] != expected:
            raise AssertionError(f"expected {kind} to return the bytes of the files")
    for _ in range(ROUNDS):
        for kind, read in readers.items():
            began = time.perf_counter()
            for i in order:
                read(int(i))
            seconds[kind].append(time.perf_counter() - began)
    best = {kind: min(found) for kind, found in seconds.items()}
    version, kib, load = importlib.metadata.version("litdata"), sizes["folder"] / len(names) / 1024, os.getloadavg()[0]
    of = f"{len(names):,} files of {kib:.0f} KiB on average, from the page cache, one process"
    lines = [
        "# Reading shapes at random",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, litdata {version}, load before {load:.1f}. "
        f"`python benchmarks/packs.py`: {of}, best of {ROUNDS} rounds in turn.",
        "",
        "| | files/s | µs a file | MiB on disk |",
        "|---|---|---|---|",
    ]
    for kind, found in best.items():
        each = found / len(names)
        lines.append(f"| {kind} | {1 / each:,.0f} | {1e6 * each:.0f} | {sizes[kind] / 2**20:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Pack a data folder: millions of small files into a few large ones, with random access, on disk or for a URL.

    python -m training.pack training/configs/pack.toml data_dir=data/mine out=data/packed

Writes the shapes, views, surfels and latents of all shapes in the index to `out`, as tar files and a table of where
each file begins (`training.data.packs`). The trainers take `data_dir=data/packed`, or the URL of a copy of it, such as
`data_dir=https://…` or `s3://…`, and see the same batches as from the folder.

Each file is compared with its checksums; a damaged one is named and left out, and the script ends if they are too many.
`pack.json` is written last, and before that nothing reads the pack. A stopped run continues where it was; another run
packs what has changed. `shard=i/n` writes the i-th of n parts of the tar files, as a task of an array; the last task to
finish writes pack.json. Exit code 1: too many files are damaged, or the disk refused a file.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from d3ds2.storage.atomic_file import replacing
from training.command import run_command
from training.data.array_files import DamagedFileError, names_in, read_arrays, read_header, write_arrays
from training.data.batch_plans import cut
from training.data.cameras import TABLE, Table, read_table
from training.data.damaged_files import READ_ERRORS, DamagedFiles
from training.data.index_files import read_index
from training.data.packs import COLUMNS, ENTRIES, FORMAT, MANIFEST, key_of
from training.data.png_files import is_whole
from training.data.point_maps import point_map_of
from training.data.shape_files import latent_path, shape_path, view_folder
from training.data.shards import Shard
from training.data.surfels import surfels_path
from training.data.symmetry import NUM_SYMMETRIES

MIB = 1 << 20
READ_AT_ONCE = 64  # files
SCRIPT_OF = {  # makes files again
    "shapes": "prepare_shapes",
    "views": "render_views",
    "surfels": "sample_surfels",
    "latents": "encode_latents",
}


@dataclass(frozen=True)
class PackConfig:
    data_dir: str = "data"
    out: str = "packed"
    tar_mib: int = 1024  # of a tar file; a larger file has one of its own
    workers: int = 8  # threads that read files
    shard: str = "0/1"  # the part i/n of the tar files that this task writes

    def __post_init__(self):
        Shard.parse(self.shard)
        if self.tar_mib < 1:
            raise ValueError(f"expected tar_mib >= 1, got {self.tar_mib}")


class Source(NamedTuple):
    """A file to pack."""

    name: str  # in the data_dir
    shape: int  # the number of its shape in the index
    size: int
    changed: int  # when, in ns


class Tar(NamedTuple):
    """A tar file, what it is made of, and beside it the table of its files."""

    path: Path
    sources: list[Source]

    @property
    def table(self) -> Path:
        """The file of its entries."""
        return self.path.with_suffix(".safetensors")

    @property
    def made_of(self) -> str:
        """A hash of the files that it is made of."""
        return hashlib.sha256(json.dumps(self.sources).encode()).hexdigest()

    def is_current(self) -> bool:
        """Whether it was made of these files as they are now."""
        try:
            about = read_header(self.table).about
            return about["made_of"] == self.made_of and about["bytes"] == self.path.stat().st_size
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return False


def list_sources(data_dir: Path, names: list[str], cameras: Table) -> dict[str, list[Source]]:
    """List the files of the named shapes that are there, by the folder in which they are packed."""
    pictures = {name: cameras.lists[place] for name, place in zip(cameras.names, cameras.list_of, strict=True)}

    def paths(folder: str, name: str) -> list[Path]:
        kind, _, resolution = folder.partition("/")
        if kind == "views":
            files = [view_folder(data_dir, name) / file for file in pictures.get(name, [])]
            maps = map(point_map_of, files if files and point_map_of(files[0]).is_file() else [])
            return [view_folder(data_dir, name) / "cameras.json", *files, *maps] if files else []
        if kind == "surfels":
            return [surfels_path(data_dir, name)]
        if kind == "shapes":
            return [shape_path(data_dir, int(resolution), name)]
        return [latent_path(data_dir, int(resolution), name, symmetry) for symmetry in range(NUM_SYMMETRIES)]

    found = (path for kind in ("shapes", "latents") for path in data_dir.glob(f"{kind}/*") if path.name.isdecimal())
    folders = [*sorted(path.relative_to(data_dir).as_posix() for path in found), "views", "surfels"]
    listed: dict[str, list[Source]] = {folder: [] for folder in folders}
    for folder, sources in listed.items():
        for shape, name in enumerate(names):
            for path in paths(folder, name):
                with contextlib.suppress(FileNotFoundError):
                    stat = os.stat(path)
                    inside = path.relative_to(data_dir).as_posix()
                    sources.append(Source(inside, shape, stat.st_size, stat.st_mtime_ns))
    return {folder: sources for folder, sources in listed.items() if sources}


def plan_tars(out: Path, listed: dict[str, list[Source]], tar_bytes: int) -> dict[str, list[Tar]]:
    """Cut the files of each folder into tars of about this size, in order."""
    tars = {}
    for folder, sources in listed.items():
        starts = cut(np.array([source.size for source in sources]), len(sources), tar_bytes)
        ends = [*starts[1:], len(sources)]
        tars[folder] = [
            Tar(out / folder / f"{number:05d}.tar", sources[start:end])
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
    return tars


class _Content(NamedTuple):
    """The content of a file, read as the file."""

    path: Path
    content: bytes

    def open(self, _mode: str) -> BinaryIO:
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return str(self.path)


def read_checked(path: Path) -> bytes:
    """Read a file that is to be packed.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it differs from its checksums, or is cut off.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"missing file {path}") from None
    if path.suffix == ".safetensors":
        file = cast(Path, _Content(path, content))
        read_arrays(file, *names_in(file))
    elif path.suffix == ".png" and not is_whole(content):
        raise DamagedFileError(f"damaged picture {path}")
    return content


def write_tar(tar: Tar, data_dir: Path, damaged: DamagedFiles, pool: ThreadPoolExecutor) -> int:
    """Write a tar and the table of its files; return the number of damaged files that it leaves out.

    Raises:
        TooManyDamagedError: too many shapes have damaged files.
        OSError: the disk refuses a file.
    """

    def read(source: Source) -> bytes | Exception:
        try:
            return read_checked(data_dir / source.name)
        except READ_ERRORS as error:
            return error

    packed, left_out = [], 0
    with replacing(tar.path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as file:
            for first in range(0, len(tar.sources), READ_AT_ONCE):
                sources = tar.sources[first : first + READ_AT_ONCE]
                for source, content in zip(sources, pool.map(read, sources), strict=True):
                    if isinstance(content, Exception):
                        damaged.add(source.shape, content)
                        left_out += 1
                        continue
                    about = tarfile.TarInfo(source.name)
                    about.size, about.mtime = len(content), source.changed // 10**9
                    file.addfile(about, io.BytesIO(content))
                    start = file.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    packed.append((key_of(source.name), start, len(content)))
        num_bytes = temporary.stat().st_size
    key, start, length = np.array(packed, dtype=np.uint64).reshape(-1, 3).T
    arrays = {"key": key, "start": start, "length": length.astype(np.uint32)}
    write_arrays(tar.table, arrays, {"made_of": tar.made_of, "bytes": num_bytes, "left_out": left_out})
    return left_out


def write_entries(folder: Path, tars: list[Tar]) -> None:
    """Merge the tables of a folder's tars into the one that readers use, and delete tars of an earlier plan.

    Raises:
        ValueError: two files have the same key.
    """
    tables = [read_arrays(tar.table, "key", "start", "length") for tar in tars]
    key, start, length = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    order, number = key.argsort(), np.arange(len(tars)).repeat([len(keys) for keys, *_ in tables])
    if (np.diff(key[order]) == 0).any():
        raise ValueError(f"expected different keys of all files in {folder}: rename a mesh")
    columns = key, number.astype(np.uint32), start, length
    arrays = {name: column[order] for name, column in zip(COLUMNS, columns, strict=True)}
    write_arrays(folder / ENTRIES, arrays)
    for tar in folder.glob("*.tar"):
        if int(tar.stem) >= len(tars):
            tar.unlink()
            tar.with_suffix(".safetensors").unlink(missing_ok=True)


def main(config: PackConfig) -> None:
    """Pack the folder, or this task's part of it.

    Raises:
        FileNotFoundError: the folder was not made by prepare_shapes.
        ValueError: the folder is packed already.
        TooManyDamagedError: too many shapes have damaged files.
        OSError: the disk is full or cannot be written. Finished tars stay.
    """
    data_dir, out, shard = Path(config.data_dir), Path(config.out), Shard.parse(config.shard)
    if (data_dir / MANIFEST).is_file() or "://" in config.data_dir:
        raise ValueError(f"expected a folder of files to pack, got the packed files in {config.data_dir}")
    records = read_index(data_dir)
    names = [record["name"] for record in records]
    cameras = read_table(data_dir, names)
    tars = plan_tars(out, list_sources(data_dir, names, cameras), config.tar_mib * MIB)
    damaged = {folder: DamagedFiles(len(names), SCRIPT_OF[folder.partition("/")[0]]) for folder in tars}
    own = shard.of([(folder, tar) for folder, planned in tars.items() for tar in planned])
    for folder in tars:
        (out / folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(config.workers) as pool:
        for folder, tar in tqdm(own, unit="tar"):
            for leftover in tar.path.parent.glob(f".{tar.path.stem}.*"):  # of a killed run
                leftover.unlink(missing_ok=True)
            if not tar.is_current():
                (out / MANIFEST).unlink(missing_ok=True)  # it is not whole until the end
                write_tar(tar, data_dir, damaged[folder], pool)
    every = [tar for planned in tars.values() for tar in planned]
    if not all(tar.is_current() for tar in every):
        print(f"shard {shard} is finished; the last shard to finish writes {out / MANIFEST}")
        return
    for folder, planned in tars.items():
        write_entries(out / folder, planned)
    small = {"index.json": json.dumps(records, indent=1)}
    for file in sorted(data_dir.glob("latents/*/moments.json")):
        if (name := file.relative_to(data_dir).as_posix()).rpartition("/")[0] in tars:
            small[name] = file.read_text()
    for name, text in small.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text)
    cameras.write(out / TABLE)
    manifest = {"format": FORMAT, "folders": list(tars), "files": [*small, TABLE]}
    with replacing(out / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    left_out = sum(read_header(tar.table).about["left_out"] for tar in every)
    files, size = sum(len(tar.sources) for tar in every), sum(tar.path.stat().st_size for tar in every)
    print(f"{files - left_out} files in {len(every)} tars, {size / 2**30:.2f} GiB, in {out}; {left_out} left out")


if __name__ == "__main__":
    run_command(main, PackConfig)

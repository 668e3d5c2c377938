"""SDF -> latents: encode all shapes once with the trained SDF VAE, as data for the latent DiT.

    python -m training.encode_latents training/configs/tiny_latents.toml data_dir=data/mine model_dir=models/mine

Writes `data_dir/latents/<R>/<name>@<symmetry>.safetensors` (coords, mean and logvar of the posterior). Measures the
latents of the first split, and writes their shift and scale to the sdf_vae's entry of `model_dir`/config.json and, with
those of each channel, to `data_dir/latents/<R>/moments.json`.

Run it again whenever the VAE or the shapes change: files of the same encoder and shape are kept, so a stopped run
continues where it was. `shard=i/n` encodes the i-th of n parts, as a task of an array (docs/cluster.md); the last task
to finish writes the scale. Under torchrun, each rank encodes a part.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.storage.atomic_file import replacing
from training.data.array_files import write_arrays
from training.data.batch_plans import cut
from training.data.damaged_files import READ_ERRORS, DamagedFiles
from training.data.latent_moments import (
    LatentMoments,
    encoder_fingerprint,
    moments_path,
    read_moments,
    set_latent_scale,
)
from training.data.loading import load_batches, to_device
from training.data.packs import open_data
from training.data.shape_batches import ShapeBatch, active_voxels, pack_shapes
from training.data.shape_files import latent_path, list_records, load_shape, read_summary, shape_path
from training.data.shards import Shard
from training.distributed import ranks_on, run_script
from training.run import RunConfig, autocast
from training.run_folder import exporting

BATCHES_AT_ONCE = 4096  # whose files are checked before the missing ones are encoded


@dataclass(frozen=True)
class EncodeLatentsConfig:
    data_dir: str = "data"
    model_dir: str = "models/model"
    splits: tuple[str, ...] = ("train",)
    resolution: int = 256
    symmetries: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)  # the views of train_dit may need them all
    max_tokens: int = 65536  # in a batch; a larger shape is a batch of its own
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    workers: int = 0
    shard: str = "0/1"  # the part i/n of the shapes that this task encodes
    keep_scale: bool = False  # leave the VAE's scale: that of another resolution, or of a latent DiT to fine-tune
    verify: bool = False  # read existing files and compare them with their checksums
    fine: bool = False  # with the second stage's VAE, `fine_sdf_vae`

    def __post_init__(self):
        Shard.parse(self.shard)

    @property
    def network(self) -> str:
        """The name of the VAE in the model folder."""
        return "fine_sdf_vae" if self.fine else "sdf_vae"


class Item(NamedTuple):
    """A shape in one symmetry, and the checksum of its file, or its number of tokens if it has none."""

    shape: int  # its number in the split
    name: str
    symmetry: int
    checksum: str


class Loaded(NamedTuple):
    """The items of a batch whose files can be read, and their shapes; None if there are none."""

    items: list[Item]
    batch: ShapeBatch | None


class AllShapes(Dataset):
    """Every shape of a split in every symmetry, in order, cut into batches: item i is the `Loaded` of batch i.

    The batches are the same for any number of tasks and after any stop, so the latents are, too.
    """

    def __init__(self, config: EncodeLatentsConfig, split: str):
        self.config, self.folder = config, open_data(config.data_dir)
        R = str(config.resolution)
        records = list_records(config.data_dir, split, config.resolution)
        self.shapes = [(r["name"], r["num_tokens"][R], r.get("checksums", {}).get(R)) for r in records]
        self.damaged = DamagedFiles(len(self.shapes), "prepare_shapes")
        tokens = np.array([tokens for _, tokens, _ in self.shapes]).repeat(len(config.symmetries))
        self.ends = [*cut(tokens, len(tokens), config.max_tokens), len(tokens)]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def items(self, index: int) -> list[Item]:
        """The items of a batch."""
        items = []
        for number in range(self.ends[index], self.ends[index + 1]):
            shape, place = divmod(number, len(self.config.symmetries))
            name, tokens, checksum = self.shapes[shape]
            items.append(Item(shape, name, self.config.symmetries[place], checksum or f"{tokens} tokens"))
        return items

    def __getitem__(self, index: int) -> Loaded:
        R, items, shapes = self.config.resolution, [], []
        for item in self.items(index):
            path = shape_path(self.folder, R, item.name)
            with contextlib.suppress(*READ_ERRORS):
                shapes.append(self.damaged.read(item.shape, partial(load_shape, path, item.symmetry)))
                items.append(item)
        return Loaded(items, pack_shapes(shapes, R) if shapes else None)


def fingerprint(encoder: str, splits: list[AllShapes]) -> str:
    """Hash all that the latents of a folder depend on: the encoder, and the shapes in their symmetries."""
    config = splits[0].config
    made_of = [encoder, config.symmetries, config.precision, [shapes.shapes for shapes in splits]]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


class LatentFiles:
    """The files of a config's latents, and what each must be made of."""

    def __init__(self, config: EncodeLatentsConfig, encoder: str):
        self.config, self.encoder, self.folder = config, encoder, open_data(config.data_dir)

    def path(self, item: Item) -> Path:
        return latent_path(self.folder, self.config.resolution, item.name, item.symmetry)

    def made_of(self, item: Item) -> str:
        return f"{self.encoder[:32]} {self.config.precision} {item.checksum}"

    def sums(self, item: Item) -> dict | None:
        """The sums of a file's latents; None if the file is missing, damaged, or of another encoder or shape."""
        summary = read_summary(self.path(item), "coords", self.config.verify)
        if summary is None or summary.about.get("made_of") != self.made_of(item):
            return None
        return summary.about["moments"]

    def write(self, item: Item, arrays: dict[str, np.ndarray], sums: dict) -> None:
        write_arrays(self.path(item), arrays, {"made_of": self.made_of(item), "moments": sums})


@torch.no_grad()
def encode(vae: SDFVAE, batch: ShapeBatch) -> list[tuple[dict[str, np.ndarray], dict]]:
    """Encode a batch.

    Returns:
        For each shape, the arrays of its file: coords (M,3) int16 in the order of `Voxels`, mean and logvar (M,C) fp16;
        and the sums that `LatentMoments` adds up.
    """
    sdf, voxels = active_voxels(batch)
    mean, logvar, latent_voxels = vae.encode(sdf, voxels)
    counts = latent_voxels.counts
    sums = []
    for parts in zip(mean.split(counts), logvar.split(counts), strict=True):
        moments = LatentMoments(mean.shape[1], mean.device)
        moments.add(*parts)
        sums.append(torch.stack([moments.sum, moments.sum_of_squares]))
    sums = [
        dict(zip(("count", "sum", "sum_of_squares"), (n, *s), strict=True))
        for n, s in zip(counts, torch.stack(sums).tolist(), strict=True)
    ]
    arrays = {"coords": latent_voxels.coords[:, 1:].short(), "mean": mean.half(), "logvar": logvar.half()}
    parts = {name: array.cpu().split(counts) for name, array in arrays.items()}
    return [({name: part[i].numpy() for name, part in parts.items()}, sums[i]) for i in range(batch.batch_size)]


def encode_missing(
    vae: SDFVAE, shapes: AllShapes, numbers: Sequence[int], files: LatentFiles, moments: LatentMoments
) -> None:
    """Encode those of these batches that miss a file; add what all their latents sum up to to `moments`, in order."""
    kept, device = 0, next(vae.parameters()).device
    run = RunConfig(precision=files.config.precision)
    with ThreadPoolExecutor() as pool, tqdm(total=len(numbers), unit="batch") as progress:
        for first in range(0, len(numbers), BATCHES_AT_ONCE):
            part = numbers[first : first + BATCHES_AT_ONCE]
            items = {number: shapes.items(number) for number in part}
            every = [item for number in part for item in items[number]]
            sums = {item: found for item, found in zip(every, pool.map(files.sums, every), strict=True) if found}
            missing = [number for number in part if not all(item in sums for item in items[number])]
            kept += len(sums)
            progress.update(len(part) - len(missing))
            chosen = Chosen(shapes, missing), 0, len(missing), files.config.workers, device
            loaded = load_batches(*chosen) if missing else ()
            written = []  # files of one batch are written while the next is encoded
            for loaded_items, batch in loaded:
                encoded = []
                if batch is not None:
                    with autocast(run, device):
                        encoded = encode(vae, to_device(batch, device))
                for file in written:
                    file.result()
                pairs = list(zip(loaded_items, encoded, strict=True))
                sums |= {item: sum_ for item, (_, sum_) in pairs}
                written = [pool.submit(files.write, item, *latents) for item, latents in pairs]
                progress.update()
            for file in written:
                file.result()
            for item in every:
                if item in sums:  # else its shape is damaged
                    moments.add_sums(sums[item])
    if kept:
        print(f"{kept} latents are up to date")


def remove_leftovers(files: LatentFiles, items: Iterable[Item]) -> None:
    """Remove what killed runs left of the files of these items, which no other task writes."""
    folder = moments_path(files.folder, files.config.resolution).parent
    leftovers: dict[str, list[Path]] = {}
    for path in folder.glob(".*.safetensors"):
        leftovers.setdefault(path.stem[1:].rpartition(".")[0], []).append(path)
    for item in items if leftovers else ():
        for path in leftovers.get(files.path(item).stem, []):
            path.unlink(missing_ok=True)


class Chosen(Dataset):
    """Some items of a dataset."""

    def __init__(self, dataset: Dataset, numbers: Sequence[int]):
        self.dataset, self.numbers = dataset, numbers

    def __getitem__(self, index: int):
        return self.dataset[self.numbers[index]]


def main(config: EncodeLatentsConfig) -> dict:
    """Encode this task's shapes; return the content of moments.json, or {} while other tasks have not finished.

    Raises:
        FileNotFoundError: there are no shapes.
        ValueError: too many shapes are damaged.
        OSError: the disk is full or cannot be written. Finished files stay.
    """
    ranks = ranks_on(config.device)
    vae = load_network(config.model_dir, config.network, ranks.device)
    shard = Shard.parse(config.shard) if ranks.size == 1 else Shard(ranks.rank, ranks.size)
    summary_file = moments_path(config.data_dir, config.resolution)
    summary_file.parent.mkdir(parents=True, exist_ok=True)
    splits = [AllShapes(config, split) for split in config.splits]
    encoder = encoder_fingerprint(vae)
    made_of, files = fingerprint(encoder, splits), LatentFiles(config, encoder)
    own_file = shard.file(summary_file)
    own = read_moments(own_file)
    own_numbers = [shard.of(range(len(shapes))) for shapes in splits]

    def own_items() -> Iterator[Item]:
        pairs = zip(splits, own_numbers, strict=True)
        return (item for shapes, numbers in pairs for number in numbers for item in shapes.items(number))

    if read_moments(summary_file).get("made_of") != made_of:
        summary_file.unlink(missing_ok=True)  # missing until all files are of this VAE
    if not config.verify and own.get("made_of") == made_of and all(files.path(item).is_file() for item in own_items()):
        print(f"the latents in {summary_file.parent} are up to date")
    else:
        own_file.unlink(missing_ok=True)
        remove_leftovers(files, own_items())
        moments, *others = (LatentMoments(vae.config.latent_channels, torch.device("cpu")) for _ in splits)
        for shapes, numbers, measured in zip(splits, own_numbers, [moments, *others], strict=True):
            encode_missing(vae, shapes, numbers, files, measured)
        own = moments.sums() | {"made_of": made_of, "encoder": encoder}  # of the first split
        write_json(own_file, own)
    ranks.wait()
    if not ranks.is_first:
        return {}
    parts = [read_moments(Shard(i, shard.count).file(summary_file)) for i in range(shard.count)]
    if any(part.get("made_of") != made_of for part in parts):
        print(f"shard {shard} is finished; the last shard to finish writes the scale of the latents")
        return {}
    moments = LatentMoments(vae.config.latent_channels, torch.device("cpu"))
    for part in parts:
        moments.add_sums(part)
    summary = moments.summary() | moments.sums() | {"made_of": made_of, "encoder": encoder}
    if config.keep_scale:
        summary |= {"latents_shift": vae.config.latents_shift, "latents_scale": vae.config.latents_scale}
    if (vae.config.latents_shift, vae.config.latents_scale) != (summary["latents_shift"], summary["latents_scale"]):
        set_latent_scale(vae, moments)
        with exporting(config.model_dir):
            save_network(config.model_dir, config.network, vae, torch.float16)
    if read_moments(summary_file) != summary:
        write_json(summary_file, summary)
    return summary


def write_json(file: Path, values: dict) -> None:
    """Write a file of JSON, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    run_script(main, EncodeLatentsConfig, sys.argv[1:])

"""SDF -> latents: encode all shapes once with the trained SDF VAE, as data for the latent DiT.

    python -m training.encode_latents training/configs/tiny_latents.toml data_dir=data/mine model_dir=models/mine

Writes `data_dir/latents/<R>/<name>@<symmetry>.safetensors` (coords, mean and logvar of the posterior). Measures the
latents of the first split, and writes their shift and scale to the sdf_vae's entry of `model_dir`/config.json and, with
those of each channel, to `data_dir/latents/<R>/moments.json`. Run it again whenever the VAE changes: it overwrites the
files, unless all of them were made by the same encoder from the same shapes.
"""

import dataclasses
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from d3ds2.kernels.devices import find_device
from d3ds2.networks.model_files import load_network, save_network
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.storage.atomic_file import replacing
from training.config import load_config
from training.data.datasets import ShapeBatch, active_voxels, load_batches, pack_shapes
from training.data.latent_moments import LatentMoments, set_latent_scale
from training.data.shape_files import latent_path, list_shapes, load_shape, shape_path, write_arrays
from training.run import RunConfig, autocast


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


class AllShapes(Dataset):
    """Every shape in every symmetry, in order: item i is the `ShapeBatch` of the (name, symmetry) in `batches[i]`."""

    def __init__(self, config: EncodeLatentsConfig, split: str):
        self.config, self.batches = config, [[]]
        names, tokens_of_shapes = list_shapes(config.data_dir, split, config.resolution)
        self.shapes = list(zip(names, tokens_of_shapes.tolist(), strict=True))
        size = 0
        for name, tokens in self.shapes:
            for symmetry in config.symmetries:
                if self.batches[-1] and size + tokens > config.max_tokens:
                    self.batches.append([])
                    size = 0
                self.batches[-1].append((name, symmetry))
                size += tokens

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> ShapeBatch:
        R = self.config.resolution
        return pack_shapes([load_shape(shape_path(self.config.data_dir, R, n), s) for n, s in self.batches[index]], R)


def fingerprint(vae: SDFVAE, splits: list[AllShapes]) -> str:
    """Hash all that latents depend on: the encoder, and the shapes in their symmetries."""
    config = splits[0].config
    encoder = dataclasses.replace(vae.config, latents_shift=0.0, latents_scale=1.0)
    made_of = [config.symmetries, config.precision, [shapes.shapes for shapes in splits], dataclasses.asdict(encoder)]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    for tensor in vae.encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def existing_moments(folder: Path, made_of: str, vae: SDFVAE, splits: list[AllShapes]) -> dict | None:
    """Read moments.json if it has this fingerprint, all latents are there, and the VAE knows their scale; else None."""
    file, config = folder / "moments.json", splits[0].config
    summary = json.loads(file.read_text()) if file.is_file() else {}
    items = [item for shapes in splits for batch in shapes.batches for item in batch]
    known = summary.get("latents_shift"), summary.get("latents_scale"), summary.get("made_of")
    if known != (vae.config.latents_shift, vae.config.latents_scale, made_of):
        return None
    return summary if all(latent_path(config.data_dir, config.resolution, *i).is_file() for i in items) else None


@torch.no_grad()
def encode(vae: SDFVAE, batch: ShapeBatch, moments: LatentMoments) -> list[dict[str, np.ndarray]]:
    """Encode a batch and count its latents in `moments`.

    Returns:
        The arrays of each shape's file: coords (M,3) int16 in the order of `Voxels`, mean and logvar (M,C) fp16.
    """
    sdf, voxels = active_voxels(batch)
    mean, logvar, latent_voxels = vae.encode(sdf, voxels)
    moments.add(mean, logvar)
    arrays = {"coords": latent_voxels.coords[:, 1:].short(), "mean": mean.half(), "logvar": logvar.half()}
    parts = {name: array.cpu().split(latent_voxels.counts) for name, array in arrays.items()}
    return [{name: part[i].numpy() for name, part in parts.items()} for i in range(batch.batch_size)]


def main(config: EncodeLatentsConfig) -> dict:
    """Encode all shapes; return the content of moments.json."""
    device = find_device(config.device)
    vae = load_network(config.model_dir, "sdf_vae", device)
    run = RunConfig(precision=config.precision)
    folder = latent_path(config.data_dir, config.resolution, "", 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    splits = [AllShapes(config, split) for split in config.splits]
    made_of = fingerprint(vae, splits)
    summary = existing_moments(folder, made_of, vae, splits)
    if summary is not None:
        print(f"the latents in {folder} are up to date")
        return summary
    (folder / "moments.json").unlink(missing_ok=True)  # missing until all files are of this VAE
    all_moments = []
    for split, shapes in zip(config.splits, splits, strict=True):
        moments = LatentMoments(vae.config.latent_channels, device)
        batches = load_batches(shapes, 0, len(shapes), config.workers, device)
        written = []
        with ThreadPoolExecutor() as pool:  # files of one batch are written while the next is encoded
            for items, batch in zip(tqdm(shapes.batches, unit="batch", desc=split), batches, strict=True):
                with autocast(run, device):
                    latents = encode(vae, batch, moments)
                for file in written:
                    file.result()
                paths = [latent_path(config.data_dir, config.resolution, *item) for item in items]
                written = [pool.submit(write_arrays, *pair) for pair in zip(paths, latents, strict=True)]
            for file in written:
                file.result()
        all_moments.append(moments)

    summary = all_moments[0].summary() | {"made_of": made_of}
    set_latent_scale(vae, all_moments[0])
    save_network(config.model_dir, "sdf_vae", vae, torch.float16)
    with replacing(folder / "moments.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    return summary


if __name__ == "__main__":
    main(load_config(EncodeLatentsConfig, sys.argv[1:]))

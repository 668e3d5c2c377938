"""One measurement of `benchmarks/scaling.py`, on each of the ranks that it starts.

The trainers' own `load_parts`, `State` and losses run on random data: curved surfaces of the paper's mean token counts
(docs/paper.md, Table 1), whose sizes differ as a log-normal distribution with a deviation of 0.4. So a rank's tokens
are balanced as in training. Pictures are random tokens: the image encoder's time is left out.
"""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.structures import surface_voxels
from d3ds2.geometry.voxels import BLOCK, Voxels
from d3ds2.kernels.devices import make_generator
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.storage.dataclass_values import from_dict
from training import train_dit, train_structure_dit
from training.data.batch_plans import draw
from training.data.latent_views import LatentBatch
from training.data.parts import Part, load_parts, split
from training.data.shape_batches import ShapeBatch, join_coords, pack_shapes
from training.data.shape_files import StoredShape
from training.data.steps import Steps
from training.distributed import Ranks, ranks_on, run_ranks
from training.losses import SDF_TERMS, FlowLossConfig, SDFLossConfig
from training.run import RunConfig, Stop, autocast, is_save_step, seed_step
from training.state import State
from training.train_vae import count_terms, vae_loss

POOL, DEVIATION = 16, 0.4  # different shapes, and how much their sizes differ
IMAGE_TOKENS = 687  # half of the tokens of a picture of 518² see the object
BAND = 3.0  # voxels


@dataclass(frozen=True)
class Work:
    """A measurement.

    Attributes:
        case: a key of CASES.
        batch: samples of the whole batch.
        steps: measured steps, after `warm_up` others, which compile kernels for most sizes of shapes.
        tiny: a small network and small shapes, for a CPU.
        out: JSON that the first rank writes.
        run_dir: folder for checkpoints; "": none.
        die_at: step after which the last rank kills itself; 0: none.
    """

    case: str
    out: str
    batch: int
    steps: int = 10
    warm_up: int = 10
    accumulate: int = 1
    sharded: bool = False
    tiny: bool = False
    run_dir: str = ""
    save_every: int = 5
    die_at: int = 0


class Case(NamedTuple):
    """A network in training.

    Attributes:
        counted, count: what its losses are means over, see `load_parts`.
        loss: (network, part, generator) -> the loss of a part.
    """

    model: nn.Module
    data: Steps
    counted: tuple[str, ...]
    count: Callable[[Any], Tensor]
    loss: Callable[[nn.Module, Part, torch.Generator], Tensor]


# --- data


def generators(step: int, batch: int, chosen: np.ndarray | slice) -> list[np.random.Generator]:
    """One for each of the chosen samples (b,), whose numbers are then the same on any number of ranks."""
    return [draw(0, step, 3, int(i)) for i in np.arange(batch)[chosen]]


class Surfaces(Steps):
    """Batches of random choices from a pool of surfaces; `make` turns chosen ones into a batch."""

    def __init__(self, tokens: int, batch: int, make: Callable[[list[np.ndarray], list[np.random.Generator]], Any]):
        sizes = tokens * np.exp(draw(0, 1).normal(-(DEVIATION**2) / 2, DEVIATION, POOL))
        self.pool = [surface_voxels(max(int(size), 8), "cpu").coords[:, 1:].numpy() for size in sizes]  # as `Voxels`
        self.batch, self.make = batch, make
        self.resolution = (max(int(coords.max()) for coords in self.pool) // BLOCK + 1) * BLOCK

    def _choices(self, step: int) -> np.ndarray:
        return draw(0, step, 2).integers(POOL, size=self.batch)

    def sizes(self, step: int) -> np.ndarray:
        return np.array([len(self.pool[i]) for i in self._choices(step)])

    def has_damage(self) -> bool:
        return False

    def load(self, step: int, chosen: np.ndarray | slice) -> Any:
        """The batch of the chosen samples (b,) of a step."""
        return self.make([self.pool[i] for i in self._choices(step)[chosen]], generators(step, self.batch, chosen))


def make_latents(surfaces: list[np.ndarray], rngs: list[np.random.Generator], channels: int) -> LatentBatch:
    """Draw latents for the tokens of surfaces, each (m, 3)."""
    coords = join_coords(surfaces)
    drawn = [rng.standard_normal((len(xyz), channels), np.float32) for xyz, rng in zip(surfaces, rngs, strict=True)]
    mean = torch.from_numpy(np.concatenate(drawn)).half()
    return LatentBatch(coords, mean, torch.zeros_like(mean), torch.zeros((len(surfaces), 4, 1, 1), dtype=torch.uint8))


def make_shapes(surfaces: list[np.ndarray], _rngs: list[np.random.Generator], resolution: int) -> ShapeBatch:
    """Put the band of a plane into each block of surfaces (m, 3): an SDF's values, in about the right numbers."""
    place = (np.arange(BLOCK, dtype=np.float32) - 3.5) / BAND
    block = np.broadcast_to(place[:, None, None].clip(-1, 1), (BLOCK,) * 3).astype(np.float16)
    stored = []
    for coords in (xyz[np.lexsort(xyz.T[::-1])] for xyz in surfaces):  # in the order of stored shapes
        sdf = np.repeat(block[None], len(coords), axis=0)
        stored.append(StoredShape(coords.astype(np.int32), sdf, np.abs(sdf) < 0.2))
    return pack_shapes(stored, resolution)


class Latents(NamedTuple):
    """Dense latents of B structures."""

    x_0: Tensor  # (B, C, g, g, g)


class Structures(Steps):
    """Random latents of structures, all of one size."""

    def __init__(self, config: StructureDiTConfig, batch: int):
        self.shape, self.batch = (config.latent_channels, *[config.resolution] * 3), batch

    def sizes(self, step: int) -> np.ndarray:
        return np.full(self.batch, self.shape[1] ** 3)

    def has_damage(self) -> bool:
        return False

    def load(self, step: int, chosen: np.ndarray | slice) -> Latents:
        """The latents of the chosen samples (b,) of a step."""
        rngs = generators(step, self.batch, chosen)
        return Latents(torch.from_numpy(np.stack([rng.standard_normal(self.shape, np.float32) for rng in rngs])))


def make_image_tokens(batch_size: int, channels: int, number: int, device: torch.device) -> ImageTokens:
    generator = torch.Generator(device).manual_seed(0)
    place = torch.arange(number, device=device).repeat(batch_size).int()
    sample = torch.arange(batch_size, device=device).repeat_interleave(number).int()
    coords = torch.stack([sample, place % 37, place // 37, torch.zeros_like(place)], dim=1)
    features = torch.randn((number, channels), generator=generator, device=device).repeat(batch_size, 1)
    return ImageTokens(features, coords, torch.ones_like(place, dtype=torch.bool), batch_size)


# --- networks


def latent_dit(work: Work, tokens: int, top_k: int) -> Case:
    config = LatentDiTConfig(top_k=top_k)
    if work.tiny:
        config = LatentDiTConfig(
            latent_channels=4, hidden_size=32, depth=2, num_heads=16, num_kv_heads=1, context_size=16, top_k=1
        )
        tokens = 400  # in several blocks
    image_tokens = 8 if work.tiny else IMAGE_TOKENS
    data = Surfaces(tokens, work.batch, partial(make_latents, channels=config.latent_channels))
    resolution = data.resolution

    def loss(model: nn.Module, part: Part, generator: torch.Generator) -> Tensor:
        coords, mean, _, images = part.batch
        voxels = Voxels(coords, resolution, len(images))
        context = make_image_tokens(len(images), config.context_size, image_tokens, coords.device)
        return train_dit.flow_loss(model, context, mean.float(), voxels, FlowLossConfig(), generator, part)

    model = LatentDiT(config)
    model.gradient_checkpointing = True
    return Case(model, data, ("tokens",), train_dit.count_tokens, loss)


def sdf_vae(work: Work, tokens: int) -> Case:
    config = SDFVAEConfig()
    if work.tiny:
        config = SDFVAEConfig(
            latent_channels=4, hidden_size=32, num_heads=2, encoder_depth=1, decoder_depth=1, group_norm_groups=2
        )
        tokens = 20
    data = Surfaces(tokens, work.batch, partial(make_shapes, resolution=0))
    data.make = partial(make_shapes, resolution=BLOCK * data.resolution)

    def loss(model: nn.Module, part: Part, generator: torch.Generator) -> Tensor:
        return vae_loss(model, part.batch, SDFLossConfig(), generator, part)["loss"]

    model = SDFVAE(config)
    model.gradient_checkpointing = True
    return Case(model, data, SDF_TERMS, count_terms, loss)


def structure_dit(work: Work) -> Case:
    config = StructureDiTConfig()
    if work.tiny:
        config = StructureDiTConfig(
            resolution=2, latent_channels=2, hidden_size=32, depth=2, num_heads=2, context_size=16
        )
    image_tokens = 8 if work.tiny else IMAGE_TOKENS

    def loss(model: nn.Module, part: Part, generator: torch.Generator) -> Tensor:
        x_0 = part.batch.x_0
        context = make_image_tokens(len(x_0), config.context_size, image_tokens, x_0.device)
        return train_structure_dit.flow_loss(model, context, x_0, FlowLossConfig(), generator, part)

    def count(batch: Latents) -> Tensor:
        return torch.tensor([len(batch.x_0)])

    return Case(StructureDiT(config), Structures(config, work.batch), ("samples",), count, loss)


CASES: dict[str, tuple[Callable[[Work], Case], int]] = {  # and the samples on each GPU; the paper's [A] for the DiT
    "latent DiT 256": (partial(latent_dit, tokens=2058, top_k=8), 8),
    "latent DiT 512": (partial(latent_dit, tokens=10655, top_k=32), 8),
    "latent DiT 1024": (partial(latent_dit, tokens=45904, top_k=8), 2),
    "SDF VAE 384": (partial(sdf_vae, tokens=5510), 4),
    "structure DiT": (structure_dit, 8),
}


# --- measurement


class Clock:
    """Adds up the seconds of the phases of a step; each phase ends when the device has done its work."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._since = device, {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def restart(self) -> None:
        """Forget what was measured during the first steps."""
        self.lap("")
        self.seconds.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """The most memory of the device that was in use."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0


def train(work: Work) -> None:
    """Train on each of the ranks, and write what the first one measured."""
    ranks = ranks_on("cpu" if work.tiny else "cuda")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    last = work.warm_up + work.steps
    run = RunConfig(
        out_dir=work.run_dir,
        steps=last,
        accumulate=work.accumulate,
        sharded=work.sharded,
        workers=0 if work.tiny else 2,
        save_every=work.save_every,
    )
    case = CASES[work.case][0](work)
    case.model.to(ranks.device).train()
    state = State(case.model, run, ranks)
    if work.run_dir:
        Path(work.run_dir).mkdir(exist_ok=True)
        state.load()
    generator, clock = make_generator(ranks.device), Clock(ranks.device)
    losses, tokens, imbalances = {}, 0, []
    steps = load_parts(case.data, state.step, run, ranks, case.counted, case.count)
    with Stop(0, ranks) as stop, state:
        for parts in steps:
            clock.lap("data")
            total = torch.zeros((), device=ranks.device)
            for part in parts:
                seed_step(generator, 0, state.step)
                with autocast(run, ranks.device):
                    loss = case.loss(case.model, part, generator)
                loss.backward()
                total += loss.detach()
            clock.lap("compute")
            ranks.wait()
            clock.lap("wait for the slowest")
            state.update()
            clock.lap("update")
            losses[state.step] = ranks.sum(total).item()
            own = ranks.all(tokens_of(case.data, state.step - 1, ranks, work.accumulate))
            tokens += sum(own)
            imbalances.append(max(own) * len(own) / sum(own))
            if is_save_step(state.step, stop, run) and work.run_dir:
                state.save()
            if state.step == work.die_at and ranks.rank == ranks.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if state.step == work.warm_up:
                clock.restart()
                tokens, imbalances = 0, []
            else:
                clock.lap("other")
            if stop:
                break
    clock.seconds.pop("other", None)
    result = {
        "ms": {phase: seconds / work.steps * 1000 for phase, seconds in clock.seconds.items()},
        "tokens": tokens / work.steps,
        "gib": max(ranks.all(clock.peak_gib())),
        "imbalance": float(np.mean(imbalances)) if imbalances else 1.0,
        "losses": losses,
    }
    if ranks.is_first:
        Path(work.out).write_text(json.dumps(result))


def tokens_of(data: Steps, step: int, ranks: Ranks, accumulate: int) -> int:
    """The tokens that this rank computes in a step."""
    sizes = data.sizes(step)
    own = split(sizes, ranks.size * accumulate)[ranks.rank * accumulate : (ranks.rank + 1) * accumulate]
    return int(sizes[list(itertools.chain(*own))].sum())


if __name__ == "__main__":
    run_ranks(lambda: train(from_dict(Work, json.loads(sys.argv[1]))))

"""Say what a recipe takes, without training and without weights: memory, operations, disk and days of each stage.

    python -m training.plan training/configs/paper gpus=8xA100 shapes=452000 [key=value ...]

`gpus` is a number and a kind of `training.gpus`; other keys are those of the recipe's configs. The numbers are
estimates. Operations follow from the sizes of the networks (`training.flops`). Time assumes a share of the GPU's peak,
and memory some bytes for each token; both are fitted to measurements on one H200, which docs/training.md compares.

Table columns: trained parameters, tokens of a batch (or voxels, pictures), memory of each GPU, operations of a step,
seconds of a step, steps and days, and what the stage adds to the disk.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from d3ds2.geometry.voxels import BLOCK
from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.sdf_vae import SDFVAE
from d3ds2.networks.structure_dit import StructureDiT
from d3ds2.networks.structure_vae import StructureVAE
from training import flops
from training.flops import ShapeSize
from training.gpus import GPU, GPUS
from training.recipe import Job, read_recipe

GIB, DAY = 1 << 30, 86400.0
STATE_BYTES = 20  # of a trained parameter in fp32: weight, gradient, two moments of AdamW, moving average
CONTEXT_GIB = 1.0  # of CUDA, libraries and kernels
FOREGROUND = 0.4  # share of a picture's patches that touch the object [D]
TOKENS = {256: 2058, 384: 5510, 512: 10655, 1024: 45904}  # of a shape, Table 1 [A]
# ratios to the number of tokens, measured on 12 meshes of the tiny model's training set, weighted by their tokens
SIZES = {
    256: ((184, 29.3, 4.99), {4: 0.0453, 8: 0.0119}, 123),
    384: ((222, 32.1, 5.19), {4: 0.0423, 8: 0.0094}, 143),
    512: ((281, 39.1, 5.97), {4: 0.0423, 8: 0.0088}, 140),
    1024: ((281, 39.1, 5.97), {4: 0.0423, 8: 0.0088}, 140),
}
# shares of the peak in bf16 that one H200 reached: 24 blocks of 1024 at 84,820 tokens; steps of the two VAEs
UTILISATION = {"transformer": 0.32, "sparse": 0.1, "convolution": 0.2}
DIT_SECONDS = 0.4  # the fastest step of 24 blocks, which the host decides below some 20,000 tokens
PICTURE_BYTES = 300_000  # PNG of 1024²
SHAPE_BYTES = 8**3 * 2 + 8**2 + 6  # of a token: SDF, sharp bits and coordinates, not compressed
LOADED = 2  # checkpoints kept, each with weights, moving average and two moments


class Cost(NamedTuple):
    """The cost of a stage."""

    trained: int = 0  # parameters
    frozen: int = 0
    amount: float = 0.0  # tokens, voxels or pictures of a batch
    activations: float = 0.0  # bytes on each GPU
    dense: float = 0.0  # operations of a step in transformers, on all GPUs
    convolutions: float = 0.0  # operations of a step in dense convolutions
    sparse: float = 0.0  # operations of a step in the SDF VAE
    least_seconds: float = 0.0  # of a step
    steps: int = 0
    disk: float = 0.0  # bytes


@dataclass(frozen=True)
class Machine:
    """The GPUs, and how many shapes there are."""

    number: int
    gpu: GPU
    shapes: int

    @classmethod
    def parse(cls, gpus: str, shapes: int) -> "Machine":
        """Read "8xA100". Raises ValueError for another form or an unlisted kind."""
        number, _, kind = gpus.partition("x")
        if not number.isdecimal() or int(number) < 1 or kind not in GPUS:
            raise ValueError(f"expected gpus=<number>x<kind>, one of {', '.join(GPUS)}, got {gpus!r}")
        return cls(int(number), GPUS[kind], shapes)


def size_at(resolution: int) -> ShapeSize:
    """The shape of Table 1 at a resolution; at another one, tokens grow with the square of the nearest."""
    nearest = min(TOKENS, key=lambda known: abs(known - resolution))
    return ShapeSize(TOKENS[nearest] * (resolution / nearest) ** 2, *SIZES[nearest])


@functools.cache
def build(network: type[nn.Module], config: Any) -> int:
    """The number of parameters of a network, which is built without memory for its weights."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in network(config).parameters())


# --- each script


def cost_of(job: Job, machine: Machine, known: dict[str, Any]) -> Cost:
    """Estimate a stage; `known` has the networks' configs of the stages before, by name, and takes those of this."""
    script, config = job.stage.script, job.config
    if script == "prepare_shapes":
        tokens = sum(size_at(R).tokens for R in config.resolutions)
        return Cost(amount=tokens, disk=machine.shapes * tokens * SHAPE_BYTES)
    if script == "render_views":
        return Cost(amount=config.views, disk=machine.shapes * config.views * PICTURE_BYTES * (config.size / 1024) ** 2)
    if script == "encode_latents":
        return encoding(config, machine, known.get(f"{job.prefix}sdf_vae"))
    cost = TRAINERS[script](config, machine, known)
    known[job.writes.name] = config.model
    exported = 2 * (cost.trained + (cost.frozen if script == "train_structure_dit" else 0))
    return cost._replace(steps=config.run.steps, disk=LOADED * 4 * 4 * cost.trained + exported)


def parts_of(config: Any, machine: Machine) -> int:
    """The parts of a batch, one after another or on different GPUs."""
    return machine.number * config.run.accumulate


def sdf_vae(config: Any, machine: Machine, _known: dict) -> Cost:
    """The SDF VAE: resolutions are drawn evenly; the largest one decides the memory."""
    C, widths = config.model.hidden_size, config.model.widths
    operations, activations, tokens = 0.0, 0.0, 0.0
    for R in config.resolutions:
        size = size_at(R)
        batch = min(config.batch_size, config.max_tokens / size.tokens)
        edge = config.crop + 2 * config.crop_margin
        share = min(1.0, (edge / (R // BLOCK)) ** 2) if config.crop else 1.0  # of a surface
        work = flops.sdf_encoder(config.model, size) + flops.sdf_decoder(config.model, size, share)
        operations += batch * work.step(config.gradient_checkpointing) / len(config.resolutions)
        tokens += batch * size.tokens / len(config.resolutions)
        full = [n * w for n, w in zip((*size.voxels, 1.0), widths, strict=True)]  # values at each encoder level
        up = [share * 8 ** (3 - i) * widths[i] for i in range(3)]  # and at each decoder level
        depth = config.model.encoder_depth + config.model.decoder_depth
        if config.gradient_checkpointing:  # inputs of all blocks, and what the largest one keeps
            kept = 2 * (sum(full) + sum(up)) + 4 * C * depth + max(10 * up[0], 10 * full[0], 60 * C)
        else:
            kept = 8 * (sum(full) + sum(up)) + 60 * C * depth
        kept += 512 * (2 + 1 + share * 24) + size.voxels[0] * (16 + 27 * 4 / 8)  # targets, losses, coordinates
        activations = max(activations, batch * size.tokens * kept / parts_of(config, machine))
    trained = build(SDFVAE, config.model)
    return Cost(trained, 0, tokens, activations, sparse=operations)


def structure_vae(config: Any, machine: Machine, _known: dict) -> Cost:
    """The structure VAE on dense grids."""
    edge, model = config.resolution // BLOCK, config.model
    work = config.batch_size * flops.structure_vae(model, edge).step(config.gradient_checkpointing)
    values = 0
    for level, (narrow, wide) in enumerate(zip(model.encoder_widths, model.decoder_widths[::-1], strict=True)):
        values += (edge // 2**level) ** 3 * (narrow * model.encoder_res_blocks + wide * model.decoder_res_blocks)
    kept = (4 if config.gradient_checkpointing else 20) * values
    activations = config.batch_size * kept / parts_of(config, machine)
    return Cost(build(StructureVAE, model), 0, config.batch_size * edge**3, activations, convolutions=work)


def structure_dit(config: Any, machine: Machine, known: dict) -> Cost:
    """The structure DiT, and the image encoder in front of it."""
    encoder = ImageEncoderConfig() if config.pretrained_encoder else config.image_encoder
    known["image_encoder"] = encoder
    trained, pictures = build(StructureDiT, config.model), build(ImageEncoder, encoder)
    context = tokens_of_picture(encoder, sparse=False)
    encoding_ = flops.image_encoder(encoder)
    work = flops.structure_dit(config.model, context).step(False)
    work += encoding_.step(False) if config.train_image_encoder else encoding_.forward
    kept = 60 * config.model.hidden_size * config.model.depth * config.model.resolution**3
    kept += 60 * encoder.hidden_size * encoder.depth * context if config.train_image_encoder else 0
    activations = config.batch_size * kept / parts_of(config, machine)
    tokens = config.batch_size * config.model.resolution**3
    if config.train_image_encoder:
        trained, pictures = trained + pictures, 0
    return Cost(trained, pictures, tokens, activations, dense=config.batch_size * work)


def dit_bytes(model: LatentDiTConfig, recompute: bool, recompute_all: bool = False) -> float:
    """The bytes of a token in a step of the latent DiT.

    Of each channel, a block keeps everything, or with `recompute` its input and what attention and feed-forward have
    made; with `recompute_all` too, its input alone. One block is at work.
    """
    at_work, everything = 67, 54
    if not recompute:
        return (everything * (model.depth - 1) + at_work) * model.hidden_size
    return ((3 if recompute_all else 15) * model.depth + at_work) * model.hidden_size


def latent_dit(config: Any, machine: Machine, known: dict) -> Cost:
    """The latent DiT, behind the image encoder."""
    size, model = size_at(config.resolution), config.model
    encoder = known.get("image_encoder", ImageEncoderConfig())
    batch = min(config.batch_size, config.max_tokens / size.tokens)
    context = tokens_of_picture(encoder, model.sparse_context)
    recompute, recompute_all = config.gradient_checkpointing, config.recompute_all
    work = flops.latent_dit(model, size, context).step(recompute, keep_attention=not recompute_all)
    work += flops.image_encoder(encoder).forward
    activations = batch * size.tokens * dit_bytes(model, recompute, recompute_all) / parts_of(config, machine)
    least = DIT_SECONDS * model.depth / 24 * config.run.accumulate
    frozen = build(ImageEncoder, encoder) + (build(SDFVAE, known["sdf_vae"]) if "sdf_vae" in known else 0)
    trained = build(LatentDiT, model)
    return Cost(trained, frozen, batch * size.tokens, activations, dense=batch * work, least_seconds=least)


def encoding(config: Any, machine: Machine, vae: Any) -> Cost:
    """All shapes once through the encoder, in each symmetry."""
    size, items = size_at(config.resolution), machine.shapes * len(config.symmetries)
    if vae is None:
        return Cost(amount=size.tokens)
    batch = max(1.0, config.max_tokens / size.tokens) * machine.number
    operations = batch * flops.sdf_encoder(vae, size).forward
    disk = items * size.tokens * (2 * 2 * vae.latent_channels + 6)
    values = size.voxels[0] * vae.widths[0] * 2 * 4
    activations = max(config.max_tokens, size.tokens) * values
    return Cost(
        0,
        build(SDFVAE, vae),
        batch * size.tokens,
        activations,
        sparse=operations,
        steps=round(items / batch),
        disk=disk,
    )


TRAINERS = {
    "train_vae": sdf_vae,
    "train_structure_vae": structure_vae,
    "train_structure_dit": structure_dit,
    "train_dit": latent_dit,
}


def tokens_of_picture(encoder: ImageEncoderConfig, sparse: bool) -> float:
    """The image tokens that a network sees: with sparse conditioning, those of the object alone (eq. 9)."""
    patches = (encoder.image_size // encoder.patch_size) ** 2
    return 1 + encoder.num_registers + patches * (FOREGROUND if sparse else 1)


# --- the table


def gib_of(cost: Cost) -> float:
    """The memory of each GPU in GiB."""
    return CONTEXT_GIB + (STATE_BYTES * cost.trained + 4 * cost.frozen + cost.activations) / GIB


def seconds_of(cost: Cost, machine: Machine) -> float:
    """The time of a step."""
    peak = machine.number * machine.gpu.bf16_tflops * 1e12
    busy = cost.dense / (peak * UTILISATION["transformer"]) + cost.sparse / (peak * UTILISATION["sparse"])
    busy += cost.convolutions / (peak * UTILISATION["convolution"])
    return max(busy, cost.least_seconds)


def table(jobs: list[Job], machine: Machine) -> str:
    """The plan as a Markdown table, with totals, and a line for each stage that does not fit the GPUs."""
    head = ("stage", "parameters", "a batch", "GiB a GPU", "TFLOP a step", "s a step", "steps", "days", "disk GiB")
    rows, notes, known = [head, tuple("-" * len(name) for name in head)], [], {}
    days, disk = 0.0, 0.0
    for job in jobs:
        cost = cost_of(job, machine, known)
        gib, seconds = gib_of(cost), seconds_of(cost, machine)
        days, disk = days + cost.steps * seconds / DAY, disk + cost.disk / GIB
        operations = (cost.dense + cost.convolutions + cost.sparse) / 1e12
        on_gpu = cost.steps > 0
        rows.append(
            (
                job.stage.name,
                f"{cost.trained / 1e6:,.0f} M" if cost.trained else "",
                f"{cost.amount:,.0f}",
                f"{gib:.1f}" if on_gpu else "",
                f"{operations:,.1f}" if on_gpu else "",
                f"{seconds:.2f}" if on_gpu else "",
                f"{cost.steps:,}" if on_gpu else "",
                f"{cost.steps * seconds / DAY:.2f}" if on_gpu else "",
                f"{cost.disk / GIB:,.1f}",
            )
        )
        if on_gpu and gib > machine.gpu.memory_gib:
            notes.append(f"{job.stage.name} does not fit {machine.gpu.memory_gib:g} GiB: {advice(job, cost, machine)}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    total = f"all stages: {days:.1f} days on the GPUs, {disk:,.0f} GiB on the disk, for {machine.shapes:,} shapes"
    return "\n".join([*lines, "", total, *notes])


def advice(job: Job, cost: Cost, machine: Machine) -> str:
    """The number of parts of a batch with which a stage fits the GPUs, if there is one."""
    left = (machine.gpu.memory_gib - gib_of(cost._replace(activations=0))) * GIB
    if job.run is None or left <= 0:
        return "take GPUs with more memory"
    factor = -(-cost.activations // left)
    return f"{job.stage.name}.run.accumulate={int(job.run.accumulate * factor)}"


@dataclass(frozen=True)
class Question:
    """The keys of this script itself."""

    gpus: str = "8xA100"
    shapes: int = 452_000


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0 if arguments else 2
    own, others = {}, []
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        if key in {field.name for field in dataclasses.fields(Question)}:
            own[key] = value
        else:
            others.append(argument)
    try:
        machine = Machine.parse(own.get("gpus", Question.gpus), int(own.get("shapes", Question.shapes)))
        print(table(read_recipe(arguments[0], others), machine))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shares = ", ".join(f"{share:.0%} for {kind} layers" for kind, share in UTILISATION.items())
    print(f"assumed of the GPU's peak ({machine.gpu.bf16_tflops:g} TFLOP/s in bf16): {shares}; see docs/training.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The networks whose launches are recorded: tiny and the released sizes, inference and training.

A case is a function without arguments that runs a network once. Its name says network, size, use and precision. The
small cases have each kernel and each kind of launch; the others have the released sizes too.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch

from d3ds2.geometry.voxels import Voxels
from d3ds2.kernels import gather_conv_triton, group_norm_triton, packed_attention_triton
from d3ds2.kernels.devices import Abilities
from d3ds2.kernels.ragged import Ragged
from d3ds2.networks.chunked_decode import decode_in_chunks
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.refiner import Refiner, RefinerConfig, SignRefiner, SignRefinerConfig
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TINY = {
    "latent_channels": 16, "hidden_size": 256, "depth": 2, "num_heads": 16, "num_kv_heads": 1, "context_size": 192,
    "compression_block": 8, "pooled_conv": False, "top_k": 4, "share_modulation": True,
}  # fmt: skip
LATENT_DITS = {
    "tiny": LatentDiTConfig(**TINY),
    "v1.0": LatentDiTConfig(depth=2),  # pools its keys by a convolution
    "v1.0 k 32": LatentDiTConfig(depth=2, top_k=32),
    "v1.1": LatentDiTConfig(depth=2, compression_block=8, pooled_conv=False, sparse_context=False),
}
STRUCTURE_DITS = {
    "tiny": StructureDiTConfig(8, 4, 256, 1, 8, 4.0, 192, True, True),
    "v1.x": StructureDiTConfig(depth=1),
}
SDF_VAES = {
    "tiny": SDFVAEConfig(16, 128, 4, 2, 2, 8, 2, 256, True),
    "v1.x": SDFVAEConfig(encoder_depth=2, decoder_depth=2),
}
WIDTHS = {"tiny": (8, 16, 32, 128), "v1.x": (32, 64, 128, 512)}  # channels of the SDF VAE's grids
SMALL_DITS = {
    "tiny": LatentDiTConfig(**TINY | {"depth": 1}),
    "pooled": LatentDiTConfig(hidden_size=512, depth=1, num_heads=16, num_kv_heads=1, context_size=64),
}
SMALL_STRUCTURE_DIT = StructureDiTConfig(8, 4, 256, 1, 8, 4.0, 64, True, True)
SMALL_SDF_VAE = SDFVAEConfig(16, 64, 4, 1, 1, 8, 2, 64, True)
NETWORKS = r"small|convolutions tiny (inference fp16|training bf16)"  # what small networks launch
SUBSET = NETWORKS + "|packed attention 128 training bf16"


def cases(card: Abilities, pattern: str = "") -> dict[str, Callable[[], None]]:
    """Return the cases whose name matches a regular expression."""
    return {name: case for name, case in _all(card) if re.search(pattern, name)}


def _all(card: Abilities) -> Iterable[tuple[str, Callable[[], None]]]:
    for name, config in SMALL_DITS.items():
        yield f"latent_dit small {name} inference fp16", partial(_run_latent_dit, "small", config, torch.float16)
        yield f"latent_dit small {name} training bf16", partial(_train_latent_dit, config, "bf16", [(32, [4.0] * 2)])
    yield "structure_dit small inference fp16", partial(_run_structure_dit, SMALL_STRUCTURE_DIT, torch.float16)
    yield "structure_dit small training bf16", partial(_train_structure_dit, SMALL_STRUCTURE_DIT, "bf16")
    yield "sdf_vae small decode fp16", partial(_decode, SMALL_SDF_VAE, torch.float16)
    yield "refiners small inference fp16", partial(_refine, torch.float16, 8)
    yield "sdf_vae small training bf16", partial(_train_sdf_vae, SMALL_SDF_VAE, "bf16", [3.0] * 2)
    for precision, dtype in DTYPES.items():
        for name, config in LATENT_DITS.items():
            yield f"latent_dit {name} inference {precision}", partial(_run_latent_dit, name, config, dtype)
        for name, config in STRUCTURE_DITS.items():
            yield f"structure_dit {name} inference {precision}", partial(_run_structure_dit, config, dtype)
        for name, config in SDF_VAES.items():
            yield f"sdf_vae {name} decode {precision}", partial(_decode, config, dtype)
            yield f"sdf_vae {name} encode {precision}", partial(_encode, config, dtype)
        yield f"refiners v1.x inference {precision}", partial(_refine, dtype)
        for D in (64, 128) if dtype != torch.float32 else ():
            yield f"packed attention {D} inference {precision}", partial(_attend, D, dtype, False)
            yield f"packed attention {D} training {precision}", partial(_attend, D, dtype, True)
        for name, widths in WIDTHS.items():
            yield f"convolutions {name} inference {precision}", partial(_convolve, card, widths, dtype, False)
            if dtype != torch.float16:
                yield f"convolutions {name} training {precision}", partial(_convolve, card, widths, dtype, True)
    for precision in ("bf16", "fp32"):
        for name, config in LATENT_DITS.items():
            yield f"latent_dit {name} training {precision}", partial(_train_latent_dit, config, precision)
        for name, config in STRUCTURE_DITS.items():
            yield f"structure_dit {name} training {precision}", partial(_train_structure_dit, config, precision)
        for name, config in SDF_VAES.items():
            yield f"sdf_vae {name} training {precision}", partial(_train_sdf_vae, config, precision)


def shells(radii: list[float], resolution: int, half: float = 0.9) -> Voxels:
    """One sample for each radius: the voxels near that sphere; none for a radius of 0."""
    axis = torch.arange(resolution) + 0.5 - resolution / 2
    distance = sum(x**2 for x in torch.meshgrid(axis, axis, axis, indexing="ij")).sqrt()
    samples = [((distance - radius).abs() < half).nonzero() for radius in radii]
    rows = [torch.nn.functional.pad(sample, (1, 0), value=i) for i, sample in enumerate(samples)]
    return Voxels.sort(torch.cat(rows).int(), resolution, len(radii))[0]


def image_tokens(samples: int, size: int, dtype: torch.dtype, each: int = 300) -> ImageTokens:
    rows = torch.arange(samples * each)
    coords = torch.stack([rows // each, rows % 37, rows // 37 % 37, rows * 0], 1).int()
    return ImageTokens(
        torch.zeros(len(rows), size, dtype=dtype), coords, torch.ones(len(rows), dtype=torch.bool), samples
    )


@torch.no_grad()
def _run_latent_dit(name: str, config: LatentDiTConfig, dtype: torch.dtype) -> None:
    model = LatentDiT(config).to(dtype).eval()
    sizes = {"small": [(32, 4.0)], "tiny": [(32, 10.0), (32, 4.0)]}
    for resolution, radius in sizes.get(name, [(64, 4.0), (64, 13.0)]):
        for samples in (1, 2) if dtype == torch.float16 else (1,):
            voxels = shells([radius] * samples, resolution)
            tokens = image_tokens(samples, config.context_size, dtype)
            model(torch.zeros(len(voxels), config.latent_channels), torch.zeros(samples), voxels, tokens)


@torch.no_grad()
def _run_structure_dit(config: StructureDiTConfig, dtype: torch.dtype) -> None:
    model, R = StructureDiT(config).to(dtype).eval(), config.resolution
    x = torch.zeros(2, config.latent_channels, R, R, R)
    model(x, torch.zeros(2), image_tokens(2, config.context_size, dtype))


def _decode(config: SDFVAEConfig, dtype: torch.dtype) -> None:
    voxels = shells([3.0], 32)
    decode_in_chunks(SDFVAE(config).to(dtype).eval(), torch.zeros(len(voxels), config.latent_channels), voxels, 2 << 30)


@torch.no_grad()
def _encode(config: SDFVAEConfig, dtype: torch.dtype) -> None:
    voxels = shells([10.0], 32, 2.5)
    SDFVAE(config).to(dtype).eval().encode(torch.zeros(len(voxels), 1), voxels)


@torch.no_grad()
def _refine(dtype: torch.dtype, edge: int = 24) -> None:
    model = Refiner(RefinerConfig(patch_size=edge)).to(dtype).eval()
    model(torch.zeros(1, 1, edge, edge, edge, dtype=dtype), torch.zeros(1, 8, edge, edge, edge, dtype=dtype))
    edge += 8
    SignRefiner(SignRefinerConfig(patch_size=edge)).to(dtype).eval()(torch.zeros(1, 1, edge, edge, edge, dtype=dtype))


def _attend(D: int, dtype: torch.dtype, training: bool) -> None:
    q, k, v = (torch.zeros(200, 2, D, dtype=dtype, requires_grad=training) for _ in range(3))
    offsets = torch.tensor([0, 100, 200], dtype=torch.int32)
    out = packed_attention_triton.packed_attention_triton(q, k, v, offsets, offsets, D**-0.5)
    if training:
        out.sum().backward()


def _convolve(card: Abilities, w: tuple[int, ...], dtype: torch.dtype, training: bool) -> None:
    """Convolve from 16 to 128 rows at a time, as many as larger structures have; channels as in an SDF VAE."""
    pairs = {(w[i], w[i + 1]) for i in range(3)} | {(w[i + 1], w[i + 1]) for i in range(3)}
    pairs |= {(w[i + 1], w[i]) for i in range(3)} | {(w[i], 8 * w[i]) for i in range(3)} | {(64, 64)}
    programs = gather_conv_triton.CONV_PROGRAMS * card.multiprocessors
    for channels, out_channels in sorted(pairs):
        for rows in (16, 32, 64, 128):
            N = rows * programs // max(1, -(-out_channels // 64))
            x, neighbors = torch.empty(1, N, channels, dtype=dtype), torch.empty(27, N, dtype=torch.int32)
            weight, bias = (torch.empty(1, *s, out_channels, dtype=dtype) for s in ((27, channels), ()))
            gather_conv_triton.gather_convs(x, neighbors, weight, bias)
            if training:
                dout = torch.empty(1, N, out_channels, dtype=dtype)
                gather_conv_triton.gather_convs(dout, neighbors, weight, transposed=True)
                gather_conv_triton.gather_convs_gradients(x, neighbors, dout, torch.float32)
    samples = Ragged(torch.tensor([0, 70000], dtype=torch.int32), 70000)
    for channels in w[1:]:
        x, weight = torch.empty(1, 70000, channels, dtype=dtype), torch.empty(1, channels)
        statistics = group_norm_triton.group_norm_statistics(x, samples, min(32, channels), 1e-5)
        group_norm_triton.group_norm_apply(x, samples, statistics, weight, weight, True, x)


def training_precision(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def _train_latent_dit(
    config: LatentDiTConfig, precision: str, structures: Iterable = ((32, [10.0] * 2), (64, [4.0, 0.0, 8.0]))
) -> None:
    model = LatentDiT(config).train()
    for resolution, radii in structures:
        latent_dit_step(model, shells(radii, resolution), precision)


def latent_dit_step(model: LatentDiT, voxels: Voxels, precision: str, each: int = 300) -> None:
    """Run a forward and a backward pass with `each` image tokens for a sample."""
    samples, config = voxels.batch_size, model.config
    with training_precision(precision):
        tokens = image_tokens(samples, config.context_size, torch.float32, each)
        out = model(torch.randn(len(voxels), config.latent_channels), torch.rand(samples), voxels, tokens)
    out.float().square().mean().backward()


def _train_structure_dit(config: StructureDiTConfig, precision: str) -> None:
    model, R = StructureDiT(config).train(), config.resolution
    with training_precision(precision):
        x = torch.randn(2, config.latent_channels, R, R, R)
        out = model(x, torch.rand(2), image_tokens(2, config.context_size, torch.float32))
    out.float().square().mean().backward()


def _train_sdf_vae(config: SDFVAEConfig, precision: str, radii: Iterable[float] = (10.0, 5.0)) -> None:
    sdf_vae_step(SDFVAE(config).train(), shells([*radii], 32, 2.5), precision)


def sdf_vae_step(model: SDFVAE, voxels: Voxels, precision: str) -> None:
    """Run a forward and a backward pass."""
    with training_precision(precision):
        out, _, mean, logvar = model(torch.randn(len(voxels), 1), voxels)
    (out.float().square().mean() + mean.square().mean() + logvar.mean()).backward()

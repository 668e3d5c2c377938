"""config.yaml of the released checkpoints -> the configurations of our networks, and how to sample the model.

v1.0 and v1.1 differ only in the sparse transformers: in how they compress keys and values, and in the image tokens that
they see. Settings for memory or training are ignored; settings that change the numbers must be the released ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..networks.latent_dit import LatentDiTConfig
from ..networks.sdf_vae import SDFVAEConfig
from ..networks.structure_dit import StructureDiTConfig
from ..networks.structure_vae import StructureVAEConfig
from ..storage.dataclass_values import from_dict
from ..storage.model_folder import FineSamplingConfig, SamplingConfig
from ..storage.one_line import OneLineError, one_line

VERSIONS = {  # (pooled_conv, sparse_context, compression_block) of the latent transformers
    (True, True, 4): "v1.0",
    (False, False, 8): "v1.1",
}
STRUCTURE_STEPS, LATENT_STEPS, FINE_STEPS, GUIDANCE = 50, 30, 15, 7.0  # defaults of the released pipeline
LEVEL = 0.2  # value of the SDF at the surface; after refinement it is twice as much
LATENT_FACTOR = 8  # SDF voxels along the edge of a latent voxel
MAX_GROUPS = 32  # groups of the group norms in the SDF encoder
LARGEST, MOST_LISTS = 1 << 16, 500  # bytes and lists of a config.yaml
FIXED_SETTINGS = {  # of the transformers: our networks can run these values alone
    "pe_mode": "ape",
    "use_shift": True,
    "share_mod": False,
    "qk_rms_norm_cross": False,
    "window_size": 8,
    "patch_size": 1,
}


class OfficialError(OneLineError):
    """Released files that are missing, damaged, of another version, or hold more than data. The message is one line."""


@dataclass(frozen=True)
class OfficialModel:
    """The content of config.yaml.

    Attributes:
        version: "v1.0" or "v1.1".
        networks: the configuration of each of our networks except the refiners, whose widths only the weights show.
        refiners: what is known about the refiners: layers, middle_layers and patch_size.
        sampling: how to sample the model.
        context_size: channels of the image tokens.
    """

    version: str
    networks: dict[str, Any]
    refiners: dict[str, dict[str, int]]
    sampling: SamplingConfig
    context_size: int


def read_official_config(file: Path) -> OfficialModel:
    """Read a released config.yaml.

    Raises:
        OfficialError: the file is missing or damaged, or of neither version; or a key is missing, unknown or has a
            wrong value.
    """
    entries = _read_yaml(file)
    section = {name: _Section(file, name, entries) for name in ENTRIES}
    dense_vae, dense_dit = section["dense_vae"], section["dense_dit"]
    networks = {
        "structure_vae": dense_vae.build(
            StructureVAEConfig,
            latent_channels="embed_dim",
            encoder_widths="model_channels_encoder",
            decoder_widths="model_channels_decoder",
            encoder_res_blocks="num_res_blocks_encoder",
            encoder_middle_blocks="num_res_blocks_middle_encoder",
            decoder_res_blocks="num_res_blocks_decoder",
            decoder_middle_blocks="num_res_blocks_middle_decoder",
            latents_scale="latents_scale",
            latents_shift="latents_shift",
        ),
        "structure_dit": dense_dit.build(
            StructureDiTConfig,
            resolution="resolution",
            latent_channels="in_channels",
            hidden_size="model_channels",
            depth="num_blocks",
            num_heads="num_heads",
            mlp_ratio="mlp_ratio",
            context_size="cond_channels",
            qk_rms_norm="qk_rms_norm",
        ),
        "sdf_vae": _sdf_vae(section["sparse_vae_512"]),
        "latent_dit": _latent_dit(section["sparse_dit_512"]),
        "fine_sdf_vae": _sdf_vae(section["sparse_vae_1024"]),
        "fine_latent_dit": _latent_dit(section["sparse_dit_1024"]),
    }
    transformers: list[LatentDiTConfig] = [networks["latent_dit"], networks["fine_latent_dit"]]
    version, fine_version = map(version_of, transformers)
    if version is None or version != fine_version:
        forms = " and ".join(describe(*_form(transformer)) for transformer in transformers)
        raise OfficialError(f"{file} is neither v1.0 nor v1.1: its sparse transformers have {forms}")
    sampling = SamplingConfig(
        sdf_resolution=LATENT_FACTOR * section["sparse_vae_512"]["resolution"],
        structure_steps=STRUCTURE_STEPS,
        structure_shift=section["dense_scheduler"].shift(),
        structure_guidance=GUIDANCE,
        latent_steps=LATENT_STEPS,
        latent_shift=section["sparse_scheduler_512"].shift(),
        latent_guidance=GUIDANCE,
        level=LEVEL,
        half_times=True,
        fine=FineSamplingConfig(
            sdf_resolution=LATENT_FACTOR * section["sparse_vae_1024"]["resolution"],
            steps=FINE_STEPS,
            shift=section["sparse_scheduler_1024"].shift(),
            guidance=GUIDANCE,
        ),
    )
    refiners = {
        name: {
            "layers": section[entry]["layers_per_block"],
            "middle_layers": section[entry]["layers_mid_block"],
            "patch_size": section[entry]["patch_size"],
        }
        for name, entry in (("refiner", "refiner"), ("fine_refiner", "refiner_1024"))
    }
    return OfficialModel(version, networks, refiners, sampling, dense_dit["cond_channels"])


def version_of(config: LatentDiTConfig) -> str | None:
    """Return the released version that a latent transformer belongs to, or None."""
    return VERSIONS.get(_form(config))


def describe(pooled_conv: bool, sparse_context: bool, compression_block: int) -> str:
    """Describe in words what distinguishes the versions; the arguments are a key of `VERSIONS`."""
    compression = "convolutional" if pooled_conv else "pointwise"
    context = "foreground" if sparse_context else "all"
    return f"{compression} compression of {compression_block}³ voxels over {context} image tokens"


ENTRIES = {  # entry of config.yaml: the class that it must name
    "dense_vae": "DenseShapeVAE",
    "dense_dit": "DenseDiT",
    "sparse_vae_512": "SparseSDFVAE",
    "sparse_dit_512": "SparseDiT",
    "sparse_vae_1024": "SparseSDFVAE",
    "sparse_dit_1024": "SparseDiT",
    "refiner": "Voxel_RefinerXL",
    "refiner_1024": "Voxel_RefinerXL_sign",
    "dense_scheduler": None,
    "sparse_scheduler_512": None,
    "sparse_scheduler_1024": None,
}


class _Section:
    """The parameters of one entry, with errors that name file and key."""

    def __init__(self, file: Path, name: str, entries: dict):
        entry = entries.get(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("params"), dict):
            raise OfficialError(f"{file} has no entry {name} with params: not a config.yaml of Direct3D-S2")
        target, expected = str(entry.get("target", "")).rpartition(".")[2], ENTRIES[name]
        if expected is not None and target != expected:
            raise OfficialError(f"{file}: expected {name} to be a {expected}, got {target or 'nothing'}")
        self.where, self.params = f"{file}: {name}.params", entry["params"]

    def __getitem__(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int:
            raise OfficialError(f"{self.where}.{key}: expected a whole number, got {value!r}")
        return value

    def get(self, key: str) -> Any:
        if key not in self.params:
            raise OfficialError(f"{self.where} has no {key}")
        return self.params[key]

    def shift(self) -> float:
        if (steps := self.params.get("num_train_timesteps", 1000)) != 1000:
            raise OfficialError(f"{self.where}.num_train_timesteps: expected 1000, got {steps!r}")
        shift = self.get("shift")
        if type(shift) not in (int, float) or shift <= 0:
            raise OfficialError(f"{self.where}.shift: expected a positive number, got {shift!r}")
        return float(shift)

    def build(self, cls: type, given: dict | None = None, **keys: str) -> Any:
        """Build a config of ours: `keys` maps its fields to keys of this entry, `given` has further values."""
        for key, value in FIXED_SETTINGS.items():
            if key in self.params and self.params[key] != value:
                raise OfficialError(f"{self.where}.{key}: expected {value!r}, got {self.params[key]!r}")
        if "in_channels" in self.params and self.params.get("out_channels") != self.params["in_channels"]:
            raise OfficialError(f"{self.where}: expected as many out_channels as in_channels")
        values = {field: self.get(key) for field, key in keys.items()} | (given or {})
        try:
            return from_dict(cls, values)
        except ValueError as error:
            raise OfficialError(f"{self.where}: {one_line(error)}") from None


def _sdf_vae(section: _Section) -> SDFVAEConfig:
    for size in ("model_channels", "num_heads"):
        if section[f"{size}_encoder"] != section[f"{size}_decoder"]:
            raise OfficialError(f"{section.where}: expected {size} of encoder and decoder to be equal")
    finest = section["model_channels_encoder"] // 16
    given = {
        "group_norm_groups": min(MAX_GROUPS, max(finest, 1)),
        "position_resolution": LATENT_FACTOR * section["resolution"],  # the pipeline passes a factor of 1
    }
    return section.build(
        SDFVAEConfig,
        given,
        latent_channels="embed_dim",
        hidden_size="model_channels_encoder",
        num_heads="num_heads_encoder",
        encoder_depth="num_blocks_encoder",
        decoder_depth="num_blocks_decoder",
        latents_scale="latents_scale",
        latents_shift="latents_shift",
    )


def _latent_dit(section: _Section) -> LatentDiTConfig:
    compression = section.get("compression_version")
    if compression not in ("v1", "v2"):
        raise OfficialError(f"{section.where}.compression_version: expected v1 or v2, got {compression!r}")
    return section.build(
        LatentDiTConfig,
        {"pooled_conv": compression == "v2"},
        latent_channels="in_channels",
        hidden_size="model_channels",
        depth="num_blocks",
        num_heads="num_heads",
        num_kv_heads="num_kv_heads",
        context_size="cond_channels",
        compression_block="compression_block_size",
        selection_block="selection_block_size",
        top_k="topk",
        sparse_context="sparse_conditions",
        position_factor="factor",
    )


def _form(config: LatentDiTConfig) -> tuple[bool, bool, int]:
    return config.pooled_conv, config.sparse_context, config.compression_block


def _read_yaml(file: Path) -> dict:
    import yaml  # comes with transformers; only a conversion needs it

    if not file.is_file():
        raise OfficialError(f"missing file {file}")
    try:
        if file.stat().st_size > LARGEST:
            raise OfficialError(f"expected a config.yaml of at most {LARGEST:,} bytes: {file}")
        text = file.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MOST_LISTS:  # the parser takes minutes for lists inside one another
            raise OfficialError(f"expected a config.yaml of at most {MOST_LISTS} lists: {file}")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # lists of lists may multiply
            raise OfficialError(f"expected a config.yaml without aliases: {file}")
        entries = yaml.safe_load(text)
    except OfficialError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise OfficialError(f"damaged file {file} ({one_line(error)})") from None
    if not isinstance(entries, dict):
        raise OfficialError(f"{file} is not a config.yaml of Direct3D-S2")
    return entries

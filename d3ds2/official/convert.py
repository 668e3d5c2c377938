"""Folder of the released checkpoints -> model folder:  python -m d3ds2 convert direct3d-s2-v-1-1 models/official

The folder holds config.yaml and five .ckpt files. The image encoder comes from its own file (see `dinov2`).
The model folder appears whole or not at all.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..networks import network_classes
from ..networks.model_files import save_network
from ..storage.atomic_file import STEM_LETTERS
from ..storage.model_folder import save_settings
from ..storage.one_line import one_line
from .checkpoint import check_version, our_state_dict, read_checkpoint, refiner_widths
from .config import OfficialError, OfficialModel, read_official_config
from .dinov2 import load_dinov2

FILES = {  # file: {its part: our network}
    "model_dense.ckpt": {"vae": "structure_vae", "dit": "structure_dit"},
    "model_sparse_512.ckpt": {"vae": "sdf_vae", "dit": "latent_dit"},
    "model_sparse_1024.ckpt": {"vae": "fine_sdf_vae", "dit": "fine_latent_dit"},
    "model_refiner.ckpt": {"refiner": "refiner"},
    "model_refiner_1024.ckpt": {"refiner": "fine_refiner"},
}
IMAGE_ENCODER_FILE = "dinov2_vitl14_reg4_pretrain.pth"  # as torch.hub calls it
OFFICIAL_REPO, OFFICIAL_SUBFOLDER = "wushuang98/Direct3D-S2", "direct3d-s2-v-1-1"
IMAGE_ENCODER_REPO = "facebook/dinov2-with-registers-large"

OnFile = Callable[[str], None]  # receives the name of the file that is being converted


def convert(source: Path, target: Path, image_encoder: Path | None = None, on_file: OnFile | None = None) -> str:
    """Convert a folder of released checkpoints.

    Args:
        source: a folder with config.yaml and the five files, or with one folder that has them.
        target: the model folder to make; it must be empty or not exist.
        image_encoder: a torch.hub file or transformers folder of DINOv2. Default: the torch.hub file in `source`.
        on_file: called with the name of each file before it is read.

    Returns:
        The version, "v1.0" or "v1.1".

    Raises:
        OfficialError: something is missing, damaged, of another version, or more than data. Then nothing is written.
    """
    try:
        return _convert(source, target, image_encoder, on_file or (lambda name: None))
    except OSError as error:  # a name that is too long, a folder without permission, a full disk
        raise OfficialError(f"cannot read or write {error.filename or target}: {error.strerror or error}") from None


def _convert(source: Path, target: Path, image_encoder: Path | None, report: OnFile) -> str:
    if "\0" in f"{source}{target}{image_encoder}":
        raise OfficialError("expected paths without a NUL character")
    source, given = find_release(source), target
    target = Path(os.path.realpath(given))  # where a link leads
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise OfficialError(f"{given} exists already; give a folder that does not")
    if absent := [name for name in ("config.yaml", *FILES) if not (source / name).is_file()]:
        raise OfficialError(f"missing in {source}: {', '.join(absent)}")
    image_encoder = image_encoder or source / IMAGE_ENCODER_FILE
    if not image_encoder.exists():
        raise OfficialError(
            f"no image encoder at {image_encoder}: give {IMAGE_ENCODER_FILE} of torch.hub, or a transformers folder"
        )
    official = read_official_config(source / "config.yaml")
    made = [folder for folder in target.parents if not folder.exists()]
    unfinished = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name[:STEM_LETTERS]}.", dir=target.parent))
        check_space(unfinished, sum((source / name).stat().st_size for name in FILES))
        report(image_encoder.name)
        encoder = load_dinov2(image_encoder)
        if encoder.config.hidden_size != official.context_size:
            size = encoder.config.hidden_size
            raise OfficialError(f"{image_encoder} gives tokens of {size} channels, expected {official.context_size}")
        _save(unfinished, "image_encoder", encoder, image_encoder)
        for name, parts in FILES.items():
            report(name)
            _convert_file(source / name, parts, official, unfinished)
        save_settings(unfinished, f"official-{official.version}", official.sampling)
        if target.exists():
            target.rmdir()  # it is empty
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except BaseException:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # it was not made
                folder.rmdir()
        raise
    return official.version


def find_release(source: Path) -> Path:
    """Return the folder with config.yaml: `source`, or else the one folder in it that has the file.

    Raises:
        OfficialError: `source` does not exist, or several folders in it have the file.
    """
    if not source.is_dir():
        raise OfficialError(f"no folder {source}")
    if (source / "config.yaml").is_file():
        return source
    inside = sorted(file.parent for file in source.glob("*/config.yaml"))
    if len(inside) > 1:
        raise OfficialError(f"several releases in {source}, choose one: {', '.join(folder.name for folder in inside)}")
    return inside[0] if inside else source


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk of a folder has `needed` bytes left. Raises OfficialError if not."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OfficialError(f"not enough space in {folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def download_release(repo: str, subfolder: str) -> Path:
    """Download config.yaml and the five files from a Hugging Face repository; return their folder in the cache.

    Raises:
        OfficialError: the download failed.
    """
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in ("config.yaml", *FILES)]
    return _download(repo, patterns) / subfolder


def download_image_encoder() -> Path:
    """Download DINOv2 with registers; return its transformers folder in the cache. Raises as `download_release`."""
    return _download(IMAGE_ENCODER_REPO, ["config.json", "model.safetensors"])


def _download(repo: str, patterns: list[str]) -> Path:
    import huggingface_hub  # comes with transformers; only a download needs it

    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # no network, repository, permission or space
        raise OfficialError(f"cannot download {repo}: {one_line(error)[:200]}") from None


def _convert_file(file: Path, parts: dict[str, str], official: OfficialModel, folder: Path) -> None:
    states = read_checkpoint(file, tuple(parts))
    for part, network in parts.items():
        state, config_class, network_class = states.pop(part), *network_classes(network)
        if network in official.refiners:
            config = _refiner_config(config_class, official.refiners[network], state, file)
        else:
            config = official.networks[network]
        if network.endswith("latent_dit"):
            form = config.pooled_conv, config.sparse_context, config.compression_block
            check_version(state, form, official.version, file)
        with torch.device("meta"):
            module = network_class(config)
        module.load_state_dict(our_state_dict(network.removeprefix("fine_"), module, state, file), assign=True)
        _save(folder, network, module, file)


def _refiner_config(config_class: type, sizes: dict[str, int], state: dict[str, Tensor], file: Path):
    features = state.get("latent_mlp.net.0.weight")
    read_features = {} if features is None or features.ndim != 2 else {"feature_channels": features.shape[1]}
    try:
        return config_class(widths=refiner_widths(state, file), **sizes, **read_features)
    except ValueError as error:
        raise OfficialError(f"{file}: {error}") from None


def _save(folder: Path, network: str, module: nn.Module, file: Path) -> None:
    try:
        save_network(folder, network, module)
    except OSError as error:
        raise OfficialError(f"cannot write {network} to {folder}: {error.strerror or error}") from None
    except ValueError as error:
        raise OfficialError(f"{file}: {error}") from None

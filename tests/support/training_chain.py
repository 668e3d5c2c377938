"""Small configs of all stages of training, and the model folder they share."""

import dataclasses
import json
from pathlib import Path

import torch

from d3ds2.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from d3ds2.networks.latent_dit import LatentDiT, LatentDiTConfig
from d3ds2.networks.model_files import save_network
from d3ds2.networks.sdf_vae import SDFVAE, SDFVAEConfig
from d3ds2.networks.structure_dit import StructureDiT, StructureDiTConfig
from d3ds2.networks.structure_vae import StructureVAE, StructureVAEConfig
from tests.support.training_data import R
from training import encode_latents
from training.encode_latents import EncodeLatentsConfig
from training.losses import FlowLossConfig
from training.run import RunConfig
from training.train_dit import TrainDiTConfig
from training.train_structure_dit import TrainStructureDiTConfig
from training.train_structure_vae import TrainStructureVAEConfig
from training.train_vae import TrainVAEConfig

ENCODER = ImageEncoderConfig(image_size=28, patch_size=14, hidden_size=16, depth=1, num_heads=2, num_registers=1)


@dataclasses.dataclass
class Chain:
    """Configs of the whole chain."""

    data_dir: str
    folder: Path

    @property
    def model_dir(self) -> str:
        return str(self.folder / "model")

    def run(self, name: str, **changes) -> RunConfig:
        defaults = {"learning_rate": 5e-3, "warmup_steps": 5, "log_every": 1, "ema_decay": 0.9, "tensorboard": False}
        return RunConfig(**(defaults | {"out_dir": str(self.folder / name), "device": "cpu"} | changes))

    @property
    def structure_vae(self) -> TrainStructureVAEConfig:
        model = StructureVAEConfig(
            latent_channels=2,
            encoder_widths=(8, 16),
            decoder_widths=(16, 8),
            encoder_res_blocks=1,
            encoder_middle_blocks=1,
            decoder_res_blocks=1,
            decoder_middle_blocks=1,
        )
        run = self.run("structure_vae", steps=40, workers=1)
        return TrainStructureVAEConfig(
            self.data_dir, self.model_dir, resolution=R, batch_size=4, symmetries=(0, 4), model=model, run=run
        )

    @property
    def structure_dit(self) -> TrainStructureDiTConfig:
        return TrainStructureDiTConfig(
            self.data_dir,
            self.model_dir,
            resolution=R,
            batch_size=16,
            views_per_shape=2,
            cache_views=True,
            image_encoder=ENCODER,
            model=StructureDiTConfig(
                resolution=2, latent_channels=2, hidden_size=32, depth=2, num_heads=2, context_size=16
            ),
            loss=FlowLossConfig(sample_posterior=False),
            run=self.run("structure_dit", steps=50),
        )

    @property
    def vae(self) -> TrainVAEConfig:
        model = SDFVAEConfig(
            latent_channels=4, hidden_size=32, num_heads=2, encoder_depth=1, decoder_depth=1, group_norm_groups=2
        )
        run = self.run("vae", steps=10)
        return TrainVAEConfig(self.data_dir, self.model_dir, resolutions=(R,), model=model, run=run)

    @property
    def latents(self) -> EncodeLatentsConfig:
        return EncodeLatentsConfig(self.data_dir, self.model_dir, ("train", "val"), R, max_tokens=100, device="cpu")

    @property
    def dit(self) -> TrainDiTConfig:
        model = LatentDiTConfig(
            latent_channels=4,
            hidden_size=32,
            depth=2,
            num_heads=16,
            num_kv_heads=1,
            context_size=16,
            top_k=1,
            share_modulation=True,
        )
        run = self.run("dit", steps=40, workers=1)
        return TrainDiTConfig(
            self.data_dir, self.model_dir, resolution=R, batch_size=8, views_per_shape=2, model=model, run=run
        )


def save_untrained(chain: Chain) -> None:
    """Write all networks with random weights to the model folder, and encode the latents: a start within seconds."""
    torch.manual_seed(0)
    for name, network in (
        ("image_encoder", ImageEncoder(ENCODER)),
        ("structure_vae", StructureVAE(chain.structure_vae.model)),
        ("structure_dit", StructureDiT(chain.structure_dit.model)),
        ("latent_dit", LatentDiT(chain.dit.model)),
        ("sdf_vae", SDFVAE(chain.vae.model)),
    ):
        if name.endswith("dit"):  # a new transformer returns zero
            for parameter in network.requires_grad_(False).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_network(chain.model_dir, name, network, torch.float16)
    encode_latents.main(chain.latents)


def copy_model(chain: Chain, folder: Path, *names: str) -> None:
    """Copy the networks that a stage needs, so that a further run leaves the chain's model folder alone."""
    (folder / "model").mkdir()
    settings = json.loads(Path(chain.model_dir, "config.json").read_text())
    settings["networks"] = {name: settings["networks"][name] for name in names}
    (folder / "model" / "config.json").write_text(json.dumps(settings))
    for name in names:
        file = f"{name}.safetensors"
        (folder / "model" / file).write_bytes(Path(chain.model_dir, file).read_bytes())


def resumed(train, config, folder: Path) -> tuple:
    """Return the averaged models of an uninterrupted run, and of one that was stopped half way and continued."""
    steps = 6
    results = []
    for name, stops in (("whole", [steps]), ("parts", [steps // 2, steps])):
        for stop in stops:
            run = dataclasses.replace(config.run, out_dir=str(folder / name), steps=stop)
            results.append(train(dataclasses.replace(config, model_dir=str(folder / "model"), run=run)))
    return results[0], results[-1]


def assert_equal_parameters(a, b) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)

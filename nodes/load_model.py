"""Model folder -> its networks, held by ComfyUI's memory manager."""

from comfy_api.latest import io

from .comfy.errors import plain_errors, without_tags
from .comfy.folders import TINY, model_folder, model_names
from .comfy.sockets import CATEGORY, Model, ModelSocket

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


class LoadD3DS2Model(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadD3DS2Model",
            display_name="Load D3DS2 Model",
            category=CATEGORY,
            description="Loads a Direct3D-S2 model. The small model `tiny` comes with this pack.",
            search_aliases=["direct3d", "image to 3d", "3d model loader", "d3ds2"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_names(),
                    default=TINY,
                    tooltip="The name of a folder in models/direct3d_s2 (or in a path listed under direct3d_s2 in "
                    "extra_model_paths.yaml), or `tiny`, which is included. Press R after adding a folder.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="`auto` picks what suits your device: bf16 or fp16 on a GPU, fp32 on a CPU.",
                    advanced=True,
                ),
            ],
            outputs=[
                ModelSocket.Output(
                    "model_out", display_name="model", tooltip="The loaded model, for the other nodes of this pack."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        """Refuse a model that is not here before the prompt runs; None is a name that another node will give."""
        try:
            if model is not None:
                model_folder(model)
        except ValueError as error:
            return without_tags(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model, precision) -> str:
        files = sorted(file for file in model_folder(model).glob("*.*") if file.is_file())
        return repr([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])

    @classmethod
    @plain_errors
    def execute(cls, model, precision) -> io.NodeOutput:
        """Load every network of a model folder. Raises ValueError, with advice, if the folder is not whole."""
        import comfy.model_management as mm
        import torch

        from ..d3ds2.kernels.devices import abilities
        from ..d3ds2.networks.model_files import load_network
        from ..d3ds2.pipeline import build_pipeline
        from ..d3ds2.storage.model_folder import (
            ALL_NETWORKS,
            NETWORKS,
            ModelFolderError,
            load_settings,
            network_names,
        )
        from .comfy.memory import choose_dtype, make_patcher
        from .comfy.progress import Progress, run_cancellable

        folder = model_folder(model)
        networks = {}
        try:
            name, sampling = load_settings(folder)
            names = [network for network in ALL_NETWORKS if network in NETWORKS or network in network_names(folder)]
            progress = Progress(cls.hidden.unique_id, len(names))
            for done, network in enumerate(names):
                progress.status(f"loading {network}")
                dtype = choose_dtype(network, precision)
                with torch.inference_mode(False):  # ComfyUI's /free could not move inference tensors
                    networks[network] = run_cancellable(load_network, folder, network, dtype=dtype)
                progress.update(done + 1)
            pipeline = build_pipeline(networks, sampling)
        except ModelFolderError as error:
            raise ValueError(f"{error}. Copy or convert the model {model!r} again, or choose another one.") from None
        kernels = abilities(mm.get_torch_device()).kernels
        model = Model(name, pipeline, {key: make_patcher(value) for key, value in networks.items()})
        line = f"{name}: {pipeline.stages[-1].sdf_resolution}³, {_dtypes(networks)}, {kernels}"
        return io.NodeOutput(model, ui=progress.result(line))


def _dtypes(networks) -> str:
    names = {str(next(network.parameters()).dtype).removeprefix("torch.") for network in networks.values()}
    return " and ".join(sorted(names))

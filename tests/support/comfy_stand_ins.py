"""Small stand-ins for the parts of ComfyUI that the nodes use, hand-written after 0.16.3, the oldest supported version.

They accept the keywords of that version only, so an unknown keyword fails here as it does there. They record what tests
check: progress, previews, texts, loads. `ComfyUI(folder)` puts them into `sys.modules` and loads the pack as ComfyUI
does: from its folder, under a name that contains the path. `close()` removes them. tests/comfy runs the nodes in real
ComfyUIs.
"""

import importlib.util
import io
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

ROOT = Path(__file__).parents[2]


class Port:
    """An input or output of a schema; the keywords are those of ComfyUI 0.16.3."""

    KEYWORDS: frozenset = frozenset()

    def __init__(self, id, io_type, **keywords):
        if unknown := keywords.keys() - self.KEYWORDS:
            raise TypeError(f"unexpected keyword {sorted(unknown)[0]!r} of {io_type} {id!r}")
        self.id, self.io_type, self.keywords = id, io_type, keywords

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self.keywords.get(name)


INPUT = {"display_name", "optional", "tooltip", "lazy", "extra_dict", "raw_link", "advanced"}
WIDGET = INPUT | {"default", "socketless", "force_input"}
NUMBER = WIDGET | {"min", "max", "step", "display_mode"}
KEYWORDS = {
    "INT": NUMBER | {"control_after_generate"},
    "FLOAT": NUMBER | {"round", "gradient_stops"},
    "BOOLEAN": WIDGET | {"label_on", "label_off"},
    "STRING": WIDGET | {"multiline", "placeholder", "dynamic_prompts"},
    "COMBO": (WIDGET - {"force_input"}) | {"options", "control_after_generate", "upload", "image_folder", "remote"},
}
OUTPUT = frozenset({"display_name", "tooltip", "is_output_list"})


def socket_type(io_type: str):
    def make(keywords):
        kind = type("Port", (Port,), {"KEYWORDS": frozenset(keywords)})
        return lambda id=None, **given: kind(id, io_type, **given)

    return SimpleNamespace(Input=make(KEYWORDS.get(io_type, INPUT)), Output=make(OUTPUT), io_type=io_type)


def multi_type_input(port: Port, types: list) -> Port:
    """Return the input with several types: its own first, then the others."""
    port.io_type = ",".join(dict.fromkeys([port.io_type, *(kind.io_type for kind in types)]))
    return port


@dataclass
class Schema:
    node_id: str
    display_name: str = None
    category: str = "sd"
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    hidden: list = field(default_factory=list)
    description: str = ""
    search_aliases: list = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_dev_only: bool = False
    is_api_node: bool = False
    price_badge: object = None
    not_idempotent: bool = False
    enable_expand: bool = False
    accept_all_inputs: bool = False
    essentials_category: str = None


class ComfyNode:
    hidden = None


class NodeOutput:
    def __init__(self, *args, ui=None, expand=None, block_execution=None):
        self.args, self.ui = args, ui

    def __getitem__(self, index):
        return self.args[index]


class VOXEL:
    def __init__(self, data):
        self.data = data


class MESH:
    def __init__(self, vertices, faces):
        self.vertices, self.faces = vertices, faces


class PaddedMESH:
    """The MESH of ComfyUI 0.21 and newer."""

    def __init__(self, vertices, faces, uvs=None, vertex_counts=None, face_counts=None):
        self.vertices, self.faces, self.uvs = vertices, faces, uvs
        self.vertex_counts, self.face_counts = vertex_counts, face_counts


class File3D:
    def __init__(self, source, file_format=""):
        self.source, self.format = source, file_format

    def get_data(self):
        return io.BytesIO(Path(self.source).read_bytes())


class InterruptProcessingException(BaseException):
    pass


class ModelPatcher:
    """A patcher that moves whole modules, as ComfyUI does when there are no patches."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.callbacks = {}

    def add_callback(self, call_type, callback):
        self.callbacks.setdefault(call_type, []).append(callback)

    def detach(self, unpatch_all=True):
        """Run the callbacks and move nothing, as ModelPatcherDynamic does with parameters beside submodules."""
        for callback in self.callbacks.get("on_detach_after", []):
            callback(self, unpatch_all)

    def model_size(self):
        return sum(p.nbytes for p in self.model.parameters()) + sum(b.nbytes for b in self.model.buffers())


class ComfyUI:
    """The stand-ins, what they recorded, and the pack loaded on top of them.

    `real` names modules that a real ComfyUI has already imported; they are not replaced (benchmarks/comfy_memory.py).

    Attributes to read: progress [(value, total, preview)], texts [(text, node id)], loads [(networks, memory)].
    Attributes to set: interrupt_at (number of the cancel point that raises), total_memory, supports, arguments.
    """

    def __init__(
        self,
        folder: Path,
        mesh_class: type = MESH,
        name: str = "/ComfyUI/custom_nodes/ComfyUI-D3DS2",
        real: Collection[str] = (),
        device: str = "cpu",
    ):
        self.folder, self.device = folder, torch.device(device)
        self.progress, self.texts, self.loads = [], [], []
        self.interrupt_at, self.cancel_points = None, 0
        self.total_memory = 64 << 30
        self.supports = {torch.float32} if device == "cpu" else {torch.bfloat16, torch.float16}
        self.arguments = SimpleNamespace(disable_metadata=False)
        self.modules = {name: module for name, module in self._modules(mesh_class).items() if name not in real}
        self.saved = {name: sys.modules.get(name) for name in self.modules}
        sys.modules.update(self.modules)
        self.name = name  # the same in every run, because numba caches compiled code under it
        spec = importlib.util.spec_from_file_location(self.name, ROOT / "__init__.py")
        self.pack = importlib.util.module_from_spec(spec)
        sys.modules[self.name] = self.pack
        spec.loader.exec_module(self.pack)
        extension = self._wait_for(self.pack.comfy_entrypoint())
        self._wait_for(extension.on_load())
        self.nodes = {node.define_schema().node_id: node for node in self._wait_for(extension.get_node_list())}

    def close(self) -> None:
        for name in [name for name in sys.modules if name == self.name or name.startswith(f"{self.name}.")]:
            del sys.modules[name]
        for name, module in self.saved.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module

    def run(self, node_id: str, *, node: str = "7", prompt=None, workflow=None, **inputs):
        """Run a node as ComfyUI does: with defaults, on a clone of its class that has `hidden`, in inference mode."""
        schema = self.nodes[node_id].define_schema()
        given = {port.id: port.default for port in schema.inputs if not port.optional} | inputs
        extra = None if workflow is None else {"workflow": workflow}
        hidden = SimpleNamespace(unique_id=node, prompt=prompt, extra_pnginfo=extra)
        clone = type(node_id, (self.nodes[node_id],), {"hidden": hidden})
        with torch.inference_mode():
            return clone.execute(**given)

    def module(self, name: str) -> ModuleType:
        """Import a module of the pack, such as "nodes.comfy.progress"."""
        return importlib.import_module(f"{self.name}.{name}")

    def check_interrupt(self) -> None:
        self.cancel_points += 1
        if self.interrupt_at is not None and self.cancel_points >= self.interrupt_at:
            raise InterruptProcessingException

    @staticmethod
    def _wait_for(coroutine):
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        raise RuntimeError("expected an entry point that never waits")

    def _modules(self, mesh_class: type) -> dict[str, ModuleType]:
        def module(name, **content):
            made = ModuleType(name)
            made.__dict__.update(content)
            return made

        api_io = SimpleNamespace(
            **{name.title(): socket_type(name) for name in ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")},
            **{name.title(): socket_type(name) for name in ("IMAGE", "MASK", "MESH", "VOXEL")},
            File3DAny=socket_type("FILE_3D"),
            Custom=socket_type,
            MultiType=SimpleNamespace(Input=multi_type_input),
            Schema=Schema,
            ComfyNode=ComfyNode,
            NodeOutput=NodeOutput,
            Hidden=SimpleNamespace(unique_id="UNIQUE_ID", prompt="PROMPT", extra_pnginfo="EXTRA_PNGINFO"),
        )
        latest = module(
            "comfy_api.latest",
            io=api_io,
            ComfyExtension=object,
            Types=SimpleNamespace(MESH=mesh_class, VOXEL=VOXEL, File3D=File3D),
        )
        management = module(
            "comfy.model_management",
            InterruptProcessingException=InterruptProcessingException,
            throw_exception_if_processing_interrupted=self.check_interrupt,
            get_torch_device=lambda: self.device,
            unet_offload_device=lambda: torch.device("cpu"),
            get_total_memory=lambda device: self.total_memory,
            get_free_memory=lambda device: self.total_memory,
            soft_empty_cache=lambda: None,
            OOM_EXCEPTION=torch.OutOfMemoryError,
            should_use_bf16=lambda device: torch.bfloat16 in self.supports,
            should_use_fp16=lambda device: torch.float16 in self.supports,
            vae_dtype=lambda device, allowed: next((d for d in allowed if d in self.supports), torch.float32),
            load_models_gpu=self._load,
        )
        patcher = module("comfy.model_patcher", CoreModelPatcher=ModelPatcher)
        extension = module("comfy.patcher_extension", CallbacksMP=SimpleNamespace(ON_DETACH="on_detach_after"))
        utils = module("comfy.utils", ProgressBar=self._progress_bar)
        cli_args = module("comfy.cli_args", args=self.arguments)
        folders = {"direct3d_s2": ([str(self.folder / "elsewhere" / "direct3d_s2")], set())}  # extra_model_paths.yaml
        paths = module(
            "folder_paths",
            models_dir=str(self.folder / "models"),
            folder_names_and_paths=folders,
            add_model_folder_path=lambda name, path: folders.setdefault(name, ([], set()))[0].append(path),
            get_folder_paths=lambda name: folders[name][0][:],
            get_input_directory=lambda: str(self.folder / "input"),
            get_user_directory=lambda: str(self.folder / "user"),
            get_output_directory=lambda: str(self.folder / "output"),
            get_save_image_path=self._save_path,
        )
        self.clients = []
        server = SimpleNamespace(client_id="tab", send_progress_text=self._progress_text)
        comfy = module("comfy", model_management=management, model_patcher=patcher, utils=utils, cli_args=cli_args)
        return {
            "comfy_api": module("comfy_api", latest=latest),
            "comfy_api.latest": latest,
            "comfy": comfy,
            "comfy.model_management": management,
            "comfy.model_patcher": patcher,
            "comfy.patcher_extension": extension,
            "comfy.utils": utils,
            "comfy.cli_args": cli_args,
            "folder_paths": paths,
            "server": module("server", PromptServer=SimpleNamespace(instance=server)),
        }

    def _load(self, patchers, memory_required=0, force_full_load=False) -> None:
        for patcher in patchers:
            patcher.model.to(patcher.load_device)
        self.loads.append(([type(patcher.model).__name__ for patcher in patchers], memory_required))

    def _progress_text(self, text, node_id, sid=None) -> None:
        self.texts.append((text, node_id))
        self.clients.append(sid)

    def _progress_bar(self, total, node_id=None):
        def update_absolute(value, total=total, preview=None):
            self.check_interrupt()
            self.progress.append((value, total, preview))

        return SimpleNamespace(update_absolute=update_absolute)

    @staticmethod
    def _save_path(prefix, output):
        """Return folder, name, next number, subfolder and prefix, by ComfyUI's rules."""
        path = Path(prefix)
        folder = Path(output) / path.parent
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [file.name[len(path.name) + 1 :].split("_")[0] for file in folder.glob(f"{path.name}_*")]
        counter = max([int(number) for number in numbers if number.isdigit()], default=0) + 1
        subfolder = "" if str(path.parent) == "." else str(path.parent)
        return str(folder), path.name, counter, subfolder, prefix

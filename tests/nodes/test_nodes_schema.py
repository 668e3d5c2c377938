"""The pack as ComfyUI and its front end read it: ids, inputs, texts in both languages, help pages, start-up."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.comfy_stand_ins import ROOT

SAMPLER = (
    " views_of_one_object=False sampler=euler guidance_start=1.0 guidance_end=0.0 guidance_rescale=0.0 sigmas?SIGMAS"
)
# released: names, order, types and defaults never change, or saved workflows break
SOCKETS = {
    "LoadD3DS2Model": ("model=tiny precision=auto", "D3DS2_MODEL"),
    "D3DS2RemoveBackground": (
        "image:IMAGE mask?MASK background_removal?BACKGROUND_REMOVAL method=auto invert_mask=auto foreground_ratio=0.9",
        "IMAGE MASK",
    ),
    "D3DS2SparseStructureSample": (
        "model:D3DS2_MODEL image:IMAGE seed=0 steps=0 guidance_scale=0.0" + SAMPLER,
        "D3DS2_STRUCTURE VOXEL STRING INT",
    ),
    "D3DS2SSADiTSample": (
        "model:D3DS2_MODEL structure:D3DS2_STRUCTURE image:IMAGE seed=0 steps=0 guidance_scale=0.0 max_tokens=250000"
        + SAMPLER,
        "D3DS2_LATENT",
    ),
    "D3DS2VAEDecodeSDF": (
        "model:D3DS2_MODEL latent:D3DS2_LATENT level=0.0 memory_budget_gb=0.0 keep_largest=False min_component=0.05",
        "MESH D3DS2_SDF",
    ),
    "D3DS2MeshExport": (
        "mesh:MESH,FILES filename_prefix=3d/d3ds2 format=glb target_faces=0 up_axis=Y embed_workflow=True size=1.0",
        "STRING FILE_3D LOAD3D_CAMERA",
    ),
    "D3DS2VAEEncodeMesh": ("model:D3DS2_MODEL mesh:MESH,FILES fit=True shell=0.55", "D3DS2_LATENT"),
    "D3DS2StructureFromMesh": (
        "model:D3DS2_MODEL mesh:MESH,FILES fit=True shell=0.55",
        "D3DS2_STRUCTURE VOXEL STRING INT",
    ),
    "D3DS2MeshPictures": (
        "mesh:MESH,FILES sides=1 azimuth=0.0 elevation=15.0 resolution=768",
        "IMAGE IMAGE IMAGE MASK",
    ),
}


@pytest.fixture(scope="module")
def comfy_folder(tmp_path_factory):
    """ComfyUI's folder without any model."""
    return tmp_path_factory.mktemp("comfy")


@pytest.fixture(scope="module")
def schemas(comfy):
    return {node_id: node.define_schema() for node_id, node in comfy.nodes.items()}


def test_released_sockets_stay(schemas):
    files = ",FILE_3D,FILE_3D_GLB,FILE_3D_GLTF,FILE_3D_OBJ,FILE_3D_STL,FILE_3D_PLY"

    def describe(port):
        if port.default is not None:
            return f"{port.id}={port.default}"
        return f"{port.id}{'?' if port.optional else ':'}{port.io_type.replace(files, ',FILES')}"

    found = {
        node_id: (" ".join(map(describe, schema.inputs)), " ".join(port.io_type for port in schema.outputs))
        for node_id, schema in schemas.items()
    }
    assert found == SOCKETS


def test_every_node_and_socket_is_explained(schemas):
    for node_id, schema in schemas.items():
        assert schema.category == "3d/direct3d-s2" and schema.description and schema.search_aliases
        for port in [*schema.inputs, *schema.outputs]:
            assert port.tooltip and port.tooltip.endswith("."), (node_id, port.id)
        ids = [port.id for port in schema.inputs]
        assert len(set(ids)) == len(ids)
        assert "UNIQUE_ID" in schema.hidden
    seeds = [port for schema in schemas.values() for port in schema.inputs if port.id == "seed"]
    assert len(seeds) == 2
    assert all((p.min, p.max, p.control_after_generate) == (0, 0xFFFFFFFFFFFFFFFF, True) for p in seeds)


def test_ids_of_core_are_not_taken(schemas):
    assert all("D3DS2" in node_id for node_id in schemas)


def test_every_node_has_a_help_page_that_names_its_inputs(schemas):
    docs = ROOT / "web" / "docs"  # the front end reads <id>/<language>.md if it exists, else <id>.md
    pages = [(file.stem, "en", file.read_text(encoding="utf-8")) for file in docs.glob("*.md")]
    pages += [(file.parent.name, file.stem, file.read_text(encoding="utf-8")) for file in docs.glob("*/*.md")]
    assert {page[:2] for page in pages} == {(node_id, language) for node_id in schemas for language in ("en", "zh")}
    for node_id, language, page in pages:
        texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert page.startswith(f"# {texts[node_id]['display_name']}\n")
        explained = set(re.findall(r"[a-z_0-9]+", page))
        own = {port.id for port in schemas[node_id].inputs if port.id not in ("model", "latent", "mesh", "image")}
        assert own <= explained, (node_id, own - explained)
    assert (ROOT / "web").samefile(ROOT / web_directory())


def web_directory() -> str:
    return re.search(r'WEB_DIRECTORY = "(.+)"', (ROOT / "__init__.py").read_text(encoding="utf-8"))[1]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_text_exists_in_every_language(schemas, language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert list(texts) == list(schemas)
    for node_id, schema in schemas.items():
        node = texts[node_id]
        expected = []
        for port in schema.inputs:
            expected.append((port.id, port.id, port.tooltip))
            if port.control_after_generate:
                expected.append(("control_after_generate", "control after generate", None))
        assert list(node["inputs"]) == [key for key, _, _ in expected]
        assert list(node["outputs"]) == [str(i) for i in range(len(schema.outputs))]
        values = [node["display_name"], node["description"]]
        values += [text for port in [*node["inputs"].values(), *node["outputs"].values()] for text in port.values()]
        assert all(values) and not any(set(text) & set("{}@|$") for text in values)  # the front end's own signs
        if language == "en":  # the same words as in the schema
            assert (node["display_name"], node["description"]) == (schema.display_name, schema.description)
            assert [(k, v["name"], v.get("tooltip")) for k, v in node["inputs"].items()] == expected
            outputs = [(port.display_name or port.id, port.tooltip) for port in schema.outputs]
            assert [(v["name"], v["tooltip"]) for v in node["outputs"].values()] == outputs
        else:
            assert all(any("\u4e00" <= c <= "\u9fff" for c in text) for text in values if text != "SDF")


def test_the_node_list_for_the_manager(schemas):
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {node_id: schema.description for node_id, schema in schemas.items()}


def test_only_the_v3_entry_is_exported(comfy):
    assert not hasattr(comfy.pack, "NODE_CLASS_MAPPINGS")
    assert comfy.pack.__all__ == ["WEB_DIRECTORY", "comfy_entrypoint"]


def nodes_of(workflow: dict) -> list[dict]:
    return [
        node for graph in (workflow, *workflow.get("definitions", {}).get("subgraphs", ())) for node in graph["nodes"]
    ]


def test_templates_name_no_model_that_has_to_be_fetched():
    """ComfyUI's missing-model dialog fetches single files; `tiny` is here, and other models are folders."""
    loaders, files = [], (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".onnx", ".gguf")
    for file in [*(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json")]:
        nodes = nodes_of(json.loads(file.read_text(encoding="utf-8")))
        loaders += [node["widgets_values"][0] for node in nodes if node["type"] == "LoadD3DS2Model"]
        values = [value for node in nodes for value in node.get("widgets_values") or () if isinstance(value, str)]
        assert not [value for value in values if value.lower().endswith(files)], file
    assert loaders == ["tiny"] * 6


def test_the_app_of_a_template_shows_inputs_and_outputs_that_it_has():
    for file in (ROOT / "workflows").glob("*.json"):
        workflow = json.loads(file.read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in nodes_of(workflow)}
        app = workflow["extra"]["linearData"]
        assert {nodes[number]["type"] for number in app["outputs"]} == {"Preview3D"}, file
        for number, name in app["inputs"]:
            inputs = {port["name"] for port in nodes[number]["inputs"] if "widget" in port}
            assert name in inputs, (file, number, name)
        assert {"image", "seed"} <= {name for _, name in app["inputs"]}, file


def test_the_pictures_of_the_workflows_are_placed_once(comfy):
    folder = comfy.folder / "input"
    pictures = {f"d3ds2_{file.name}": file.read_bytes() for file in (ROOT / "workflows").glob("*.png")}
    assert pictures and {file.name: file.read_bytes() for file in folder.iterdir()} == pictures
    module, name = comfy.module("nodes.comfy.folders"), min(pictures)
    (folder / name).write_bytes(b"the user's own")
    module.place_example_pictures()
    assert (folder / name).read_bytes() == b"the user's own"
    (folder / name).unlink()
    module.place_example_pictures()
    assert not (folder / name).exists()  # nobody wants it back
    placed = comfy.folder / "user" / "d3ds2_example_pictures.txt"
    assert set(placed.read_text().splitlines()) == set(pictures)
    placed.write_text("\n".join(set(pictures) - {name}))  # a picture that came with a newer version
    module.place_example_pictures()
    assert (folder / name).read_bytes() == pictures[name]


def test_an_input_folder_that_cannot_be_written_stops_nothing(comfy, monkeypatch):
    monkeypatch.setattr("folder_paths.get_input_directory", lambda: "/proc/nothing")
    comfy.module("nodes.comfy.folders").place_example_pictures()


def test_the_model_folder_is_known_and_older_paths_stay_first(comfy):
    paths, extensions = sys.modules["folder_paths"].folder_names_and_paths["direct3d_s2"]
    assert [Path(path).parent.name for path in paths] == ["elsewhere", "models"] and extensions == {".safetensors"}


def test_models_are_found_in_every_path_and_tiny_always(comfy):
    def options():
        return comfy.nodes["LoadD3DS2Model"].define_schema().inputs[0].options

    assert options() == ["tiny"]
    for place in ("models/direct3d_s2/paper", "elsewhere/direct3d_s2/mine/chairs", "models/direct3d_s2/empty"):
        (comfy.folder / place).mkdir(parents=True)
    for place in ("models/direct3d_s2/paper", "elsewhere/direct3d_s2/mine/chairs"):
        (comfy.folder / place / "config.json").write_text("{}")
    assert options() == ["tiny", "mine/chairs", "paper"]
    module = comfy.module("nodes.comfy.folders")
    assert module.model_folder("tiny").samefile(ROOT / "d3ds2" / "weights" / "tiny")
    assert module.model_folder("mine/chairs") == comfy.folder / "elsewhere/direct3d_s2/mine/chairs"


def test_a_changed_model_file_changes_the_fingerprint(comfy):
    folder = comfy.folder / "models" / "direct3d_s2" / "changing"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    fingerprint = comfy.nodes["LoadD3DS2Model"].fingerprint_inputs
    before = fingerprint("changing", "auto")
    assert fingerprint("changing", "auto") == before
    (folder / "config.json").write_text("{ }")
    assert fingerprint("changing", "auto") != before


def test_start_up_is_quiet_and_imports_nothing_heavy():
    """This runs in a process of its own, in which torch is already imported, as in ComfyUI."""
    program = """
import sys, tempfile, json
from pathlib import Path
import numpy, torch, PIL.Image
from tests.support.comfy_stand_ins import ComfyUI
before = set(sys.modules)
comfy = ComfyUI(Path(tempfile.mkdtemp()))
for node in comfy.nodes.values():
    node.define_schema()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    modules = json.loads(done.stdout)
    heavy = {"transformers", "numba", "scipy", "skimage", "trimesh", "fast_simplification", "safetensors", "triton"}
    heavy |= {"spconv", "rembg", "onnxruntime", "embreex", "torchvision", "torch._dynamo", "torch._inductor"}
    assert not heavy & {part for name in modules for part in (name, name.split(".")[0])}
    assert not [name for name in modules if ".d3ds2" in name]


def test_an_install_replaces_nothing_that_comfyui_brings():
    """The requirements pin no version of a package that ComfyUI installs itself. tests/comfy tests a real install."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = [line for line in lines if re.search("[=<>~!]", line)]
    assert pinned == ["transformers>=4.48"]  # ComfyUI 0.16.3 asks for >= 4.50.3
    assert "torchvision" not in lines and "torchaudio" not in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["comfy"]["requires-comfyui"] == ">=0.16.3"
    assert "comfyui" not in project["project"]["name"].lower()

"""The nodes, texts and templates of the pack that a real ComfyUI serves before any prompt."""

import json
import urllib.request

import pytest

from tests.comfy.installation import PACK
from tests.comfy.server import MODULE, PACK_NAME, ComfyServer
from tests.comfy.workflow_file import BLUEPRINT, WORKFLOWS, pictures_of, read, to_prompt, without_subgraph

IDS = {
    "LoadD3DS2Model": "Load D3DS2 Model",
    "D3DS2RemoveBackground": "Remove Background (Direct3D-S2)",
    "D3DS2SparseStructureSample": "Sparse Structure Sample (Rough Shape)",
    "D3DS2SSADiTSample": "SSA-DiT Sample (Surface Detail)",
    "D3DS2VAEDecodeSDF": "VAE Decode SDF (Latent to Mesh)",
    "D3DS2MeshExport": "Mesh Export",
    "D3DS2VAEEncodeMesh": "VAE Encode Mesh (Mesh to Latent)",
    "D3DS2StructureFromMesh": "Structure From Mesh",
    "D3DS2MeshPictures": "Mesh Pictures",
}
TEMPLATES = {
    "Image-to-Mesh",
    "Image-to-Mesh-with-Background-Removal",
    "Structure-Preview",
    "Refine-a-Mesh",
    "Low-Memory",
}


@pytest.fixture(scope="module")
def nodes(comfyui: ComfyServer) -> dict:
    return comfyui.get("/object_info")


def test_every_node_is_ours(nodes):
    """ComfyUI silently drops any node whose id a core node has."""
    ours = {key: info for key, info in nodes.items() if info["python_module"] == MODULE}
    assert {key: info["display_name"] for key, info in ours.items()} == IDS
    assert {info["category"] for info in ours.values()} == {"3d/direct3d-s2"}


@pytest.mark.parametrize("node", IDS)
def test_every_socket_has_a_tooltip(nodes, node):
    info = nodes[node]
    assert len(info["description"]) > 20
    assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"])
    for part in ("required", "optional"):
        for name, (_, options) in info["input"].get(part, {}).items():
            assert options.get("tooltip"), f"{node}.{name}"


@pytest.mark.parametrize("node", IDS)
def test_every_node_has_a_help_page(comfyui, node):
    page = comfyui.get(f"/extensions/{PACK_NAME}/docs/{node}.md").decode()
    assert page.startswith(f"# {IDS[node]}\n")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_name_every_socket(comfyui, nodes, language):
    texts = comfyui.get("/i18n")[language]["nodeDefs"]
    for node in IDS:
        sockets = {*nodes[node]["input"].get("required", {}), *nodes[node]["input"].get("optional", {})}
        assert sockets <= set(texts[node]["inputs"]), node
        assert len(texts[node]["outputs"]) == len(nodes[node]["output"]), node


def test_the_start_is_silent(comfyui):
    """The log has one line about the pack, from ComfyUI itself; test_nodes_schema.py tests which modules it imports."""
    beginning = comfyui.log.split("Starting server")[0]
    about_us = [line for line in beginning.splitlines() if PACK_NAME.lower() in line.lower()]
    assert len(about_us) == 1 and "seconds" in about_us[0] and "IMPORT FAILED" not in about_us[0], about_us


def test_templates_are_listed_with_their_pictures(comfyui):
    assert set(comfyui.get("/workflow_templates")[PACK_NAME]) == TEMPLATES
    for name in TEMPLATES:
        assert json.loads((PACK / "workflows" / f"{name}.json").read_text()) == comfyui.get(
            f"/api/workflow_templates/{PACK_NAME}/{name}.json"
        )
        with urllib.request.urlopen(f"{comfyui.url}/api/workflow_templates/{PACK_NAME}/{name}.jpg") as picture:
            assert picture.headers["Content-Type"] == "image/jpeg"
            assert picture.read(3) == b"\xff\xd8\xff"


def test_the_blueprint_is_listed(comfyui, nodes):
    listed = {entry["name"]: (key, entry) for key, entry in comfyui.get("/global_subgraphs").items()}
    key, entry = listed[BLUEPRINT.stem]
    assert entry["source"] == "custom_node" and entry["info"]["node_pack"] == MODULE
    assert json.loads(comfyui.get(f"/global_subgraphs/{key}")["data"]) == read(BLUEPRINT)
    prompt = to_prompt(without_subgraph(read(BLUEPRINT), "d3ds2_demo_input.png"), nodes)
    assert {"LoadD3DS2Model", "D3DS2RemoveBackground", "D3DS2MeshExport"} <= {n["class_type"] for n in prompt.values()}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_templates_fit_the_nodes(nodes, file):
    """This ComfyUI knows every node, link, choice and number of the file."""
    prompt = to_prompt(read(file), nodes)
    assert {"LoadD3DS2Model", "D3DS2MeshExport", "Preview3D"} <= {node["class_type"] for node in prompt.values()}


def test_the_pictures_of_the_templates_are_there(comfyui, nodes):
    for name in pictures_of(to_prompt(read(file), nodes) for file in WORKFLOWS):
        assert (comfyui.input / name).read_bytes() == (PACK / "workflows" / name.removeprefix("d3ds2_")).read_bytes()


def test_model_folders_of_both_places_are_listed(nodes):
    assert nodes["LoadD3DS2Model"]["input"]["required"]["model"][1]["options"] == ["tiny", "other", "random"]

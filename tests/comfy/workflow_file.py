"""Turn a workflow, as the front end saves it, into the prompt that it posts when Run is pressed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.comfy.installation import PACK
from tests.comfy.server import Graph

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"), key=lambda file: file.stem)
BLUEPRINT = PACK / "subgraphs" / "Image to 3D (Direct3D-S2).json"
INPUT, OUTPUT = -10, -20  # the ids that a subgraph's own inputs and outputs have in its links
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MUTED, BYPASSED = 2, 4


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """Return the prompt of a workflow without subgraphs, reroutes or primitives.

    Raises AssertionError where the file and the server's nodes differ: an unknown node, input, output or socket type;
    a link that only one of its ends knows; too few widget values, or values of a wrong type or outside their range.
    """
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    prompt = {}
    for node in nodes.values():
        if node["type"] in NOTES:
            continue
        assert node["mode"] not in (MUTED, BYPASSED), f"{node['type']} is muted"
        assert node["type"] in object_info, f"no node {node['type']} in this ComfyUI"
        info = object_info[node["type"]]
        outputs = [output["type"] for output in node["outputs"]]  # newer versions of core nodes have more widgets
        assert outputs == info["output"][: len(outputs)], f"outputs of {node['type']}"
        inputs = _widget_values(node, info)
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is None:
                continue
            number, source, output, target, place, kind = links.pop(socket["link"])
            assert (target, place) == (node["id"], slot), f"link {number} ends elsewhere"
            out = nodes[source]["outputs"][output]
            assert number in out["links"] and kind == out["type"], f"link {number} begins elsewhere"
            accepted = _specs(info)[socket["name"]][0]
            assert accepted == "*" or kind in accepted.split(","), f"{kind} into {node['type']}.{socket['name']}"
            inputs[socket["name"]] = [str(source), output]
        missing = set(info["input"].get("required", {})) - set(inputs)
        assert not missing, f"{node['type']} lacks {missing}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    assert not links, f"links of no node: {links}"
    return prompt


def without_subgraph(blueprint: dict[str, Any], picture: str) -> dict[str, Any]:
    """Return a blueprint as a workflow without subgraphs, which a Load Image feeds and a Preview 3D ends.

    The values of the widgets are those of the node that stands for the subgraph.

    Raises AssertionError where that node, the subgraph's inputs and outputs, and its links differ.
    """
    (host,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert host["type"] == subgraph["id"]
    for side in ("inputs", "outputs"):
        assert [(s["name"], s["type"]) for s in host[side]] == [(s["name"], s["type"]) for s in subgraph[side]]
    widgets = [name for _, name in host["properties"]["proxyWidgets"]]
    assert widgets == [socket["name"] for socket in host["inputs"] if "widget" in socket]
    values = dict(zip(widgets, host["widgets_values"], strict=True))
    nodes = {node["id"]: node for node in json.loads(json.dumps(subgraph["nodes"]))}
    load, view = max(nodes) + 1, max(nodes) + 2
    outlets = {"image": (load, 0), "mask": (load, 1)}
    nodes[load] = {
        "id": load,
        "type": "LoadImage",
        "mode": 0,
        "inputs": [],
        "outputs": [{"type": "IMAGE", "links": []}, {"type": "MASK", "links": []}],
        "widgets_values": [picture, "image"],
    }
    nodes[view] = {
        "id": view,
        "type": "Preview3D",
        "mode": 0,
        "inputs": [{"name": "camera_info", "link": None}, {"name": "model_file", "link": None}],
        "outputs": [],
        "widgets_values": ["", ""],
    }
    links, used = [], {socket["name"]: [] for socket in (*subgraph["inputs"], *subgraph["outputs"])}
    for link in subgraph["links"]:
        source, slot, target, place = (link[key] for key in ("origin_id", "origin_slot", "target_id", "target_slot"))
        if source == INPUT:
            name = subgraph["inputs"][slot]["name"]
            used[name].append(link["id"])
            socket = nodes[target]["inputs"][place]
            if name in values:
                assert socket["widget"]["name"] == name
                _set_widget(nodes[target], name, values[name])
                socket["link"] = None
                continue
            source, slot = outlets[name]
            nodes[source]["outputs"][slot]["links"].append(link["id"])
        if target == OUTPUT:
            name = subgraph["outputs"][place]["name"]
            used[name].append(link["id"])
            target, place = view, {"camera": 0, "path": 1}.get(name)
            if place is None:  # nobody takes it
                nodes[source]["outputs"][slot]["links"].remove(link["id"])
                continue
            nodes[view]["inputs"][place]["link"] = link["id"]
        links.append([link["id"], source, slot, target, place, link["type"]])
    for socket in (*subgraph["inputs"], *subgraph["outputs"]):
        assert socket["linkIds"] == used[socket["name"]], f"links of {socket['name']}"
    return {"nodes": [*nodes.values()], "links": links}


def nodes_of(prompt: Graph, class_type: str) -> list[str]:
    """Return the ids of the nodes of a class."""
    return [key for key, node in prompt.items() if node["class_type"] == class_type]


def with_widgets(prompt: Graph, values: dict[str, Any]) -> Graph:
    """Return a copy of the prompt with new values for all widgets of these names; links stay."""
    copy = json.loads(json.dumps(prompt))
    for node in copy.values():
        inputs = node["inputs"]
        inputs |= {name: new for name, new in values.items() if not isinstance(inputs.get(name, []), list)}
    return copy


def pictures_of(prompts: Iterable[Graph]) -> set[str]:
    """Return the names of the files that the prompts expect in the input folder."""
    return {prompt[key]["inputs"]["image"] for prompt in prompts for key in nodes_of(prompt, "LoadImage")}


def _set_widget(node: dict[str, Any], name: str, value: Any) -> None:
    """Set the value of a widget in a saved node, whose values stand in the order of its widgets."""
    names = []
    for socket in node["inputs"]:
        if "widget" in socket:
            names += [socket["name"], "control_after_generate"] if socket["name"] == "seed" else [socket["name"]]
    node["widgets_values"][names.index(name)] = value


def _specs(info: dict[str, Any]) -> dict[str, list]:
    return info["input"].get("required", {}) | info["input"].get("optional", {})


def _widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    values, inputs = list(node.get("widgets_values", [])), {}
    optional = info["input"].get("optional", {})
    for name, (kind, *more) in _specs(info).items():
        options = more[0] if more else {}
        is_choice = isinstance(kind, list) or kind == "COMBO"
        if not is_choice and options.get("widgetType", kind) not in WIDGETS:
            continue
        if not values and name in optional:  # newer than the file: the front end takes its default
            inputs[name] = options["default"]
            continue
        assert values, f"no value for {node['type']}.{name}"
        value = inputs[name] = values.pop(0)
        if is_choice:
            choices = kind if isinstance(kind, list) else options["options"]
            assert value in choices, f"{node['type']}.{name}: {value!r} is none of {choices}"
        elif kind in ("INT", "FLOAT"):
            assert options["min"] <= value <= options["max"], f"{node['type']}.{name}: {value!r}"
            assert kind == "FLOAT" or isinstance(value, int), f"{node['type']}.{name}: {value!r}"
        else:
            assert isinstance(value, bool if kind == "BOOLEAN" else str), f"{node['type']}.{name}: {value!r}"
        if options.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "randomize", "increment", "decrement"), f"{node['type']}.{name}"
    return inputs

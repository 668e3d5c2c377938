"""The nodes over stand-ins of ComfyUI, while they run: progress, Cancel, memory, precision, unchanged inputs."""

import hashlib
import pickle
import threading

import pytest
import torch

from tests.support.comfy_stand_ins import InterruptProcessingException
from tests.support.tiny_model import picture

pytestmark = pytest.mark.usefixtures("fresh")


def test_every_step_shows_a_picture_and_a_text(comfy, model, structure):
    for node_id, inputs, steps in (
        ("D3DS2SparseStructureSample", {"steps": 4}, 4),
        ("D3DS2SSADiTSample", {"steps": 3, "structure": structure}, 3),
    ):
        comfy.progress.clear()
        comfy.texts.clear()
        comfy.run(node_id, node="12", model=model, image=picture(), **inputs)
        assert [value[:2] for value in comfy.progress] == [(i + 1, steps) for i in range(steps)]
        for _, _, (kind, image, size) in comfy.progress:
            assert kind == "JPEG" and size == 512 and image.mode == "RGB"
            assert len(image.getcolors(1 << 20)) > 3  # something is drawn
        assert comfy.texts and all(node == "12" for _, node in comfy.texts)
        assert any(f"step 1/{steps}: " in text and "tokens" in text for text, _ in comfy.texts)


def test_the_last_text_of_a_node_stays_as_its_output(comfy, model, structure, latent, ball):
    tokens = f"{len(structure.coords):,} tokens at 8³"
    runs = [
        ("LoadD3DS2Model", {"model": "random"}, "random: 64³, float32, torch"),
        ("D3DS2RemoveBackground", {"image": picture(2)}, "picture 1/2: alpha; picture 2/2: alpha"),
        ("D3DS2SparseStructureSample", {"model": model, "image": picture(), "seed": 5}, tokens),
        ("D3DS2SSADiTSample", {"model": model, "structure": structure, "image": picture()}, tokens),
        ("D3DS2VAEDecodeSDF", {"model": model, "latent": latent}, f" faces from {tokens}"),
        ("D3DS2VAEEncodeMesh", {"model": model, "mesh": ball}, " tokens at 8³"),
        ("D3DS2StructureFromMesh", {"model": model, "mesh": ball}, " tokens at 8³"),
        ("D3DS2MeshExport", {"mesh": ball, "filename_prefix": "stays/<b>"}, "1,280 faces in ‹b›_00001_.glb"),
    ]
    for node_id, inputs, expected in runs:
        comfy.texts.clear()
        text = "; ".join(comfy.run(node_id, **inputs).ui["status_text"])
        assert expected in text and text == comfy.texts[-1][0], node_id


class Clock:
    """A stand-in for the module `time`: seconds pass only when `pass_by` is called."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_slow_pictures_are_drawn_less_often(comfy, monkeypatch):
    module, clock = comfy.module("nodes.comfy.progress"), Clock()
    monkeypatch.setattr(module, "time", clock)
    progress = module.Progress("1", 50)
    drawn = []

    def draw():
        drawn.append(clock.pass_by(0.02))
        return "picture"

    for step in range(50):
        clock.pass_by(0.005)
        progress.update(step + 1, draw)
    assert 2 <= len(drawn) <= 5  # they take a fifth of the time; without the limit there would be 50
    assert [preview[1] for _, _, preview in comfy.progress] == ["picture"] * 50


def test_every_layer_of_every_loop_can_be_cancelled(comfy, model, structure, latent, ball):
    runs = {
        "D3DS2SparseStructureSample": {"model": model, "image": picture()},
        "D3DS2SSADiTSample": {"model": model, "structure": structure, "image": picture()},
        "D3DS2VAEDecodeSDF": {"model": model, "latent": latent},
        "D3DS2VAEEncodeMesh": {"model": model, "mesh": ball},
        "D3DS2StructureFromMesh": {"model": model, "mesh": ball},
        "D3DS2MeshExport": {"mesh": ball, "filename_prefix": "cancelled/mesh"},
        "LoadD3DS2Model": {"model": "random"},
    }
    least = {"D3DS2SparseStructureSample": 100, "D3DS2SSADiTSample": 50, "D3DS2VAEDecodeSDF": 5}
    for node_id, inputs in runs.items():
        comfy.interrupt_at, comfy.cancel_points = None, 0
        comfy.run(node_id, **inputs)
        points = least.get(node_id, 2)
        assert comfy.cancel_points >= points
        files = set(comfy.folder.rglob("*.glb"))
        for at in {1, points // 2, points}:
            comfy.interrupt_at, comfy.cancel_points = at, 0
            with pytest.raises(InterruptProcessingException):
                comfy.run(node_id, **inputs)
        comfy.interrupt_at = None
        assert set(comfy.folder.rglob("*.glb")) - files == set() or node_id == "D3DS2MeshExport"
    assert not any(network._forward_pre_hooks for p in model.get_models() for network in p.model.modules())
    assert not list((comfy.folder / "output").rglob(".*"))  # nothing half-written


def test_a_long_call_is_left_at_the_next_check_of_the_button(comfy):
    module = comfy.module("nodes.comfy.progress")
    assert module.POLL <= 0.1  # seconds between two checks
    may_end, ended = threading.Event(), threading.Event()

    def long_call():
        may_end.wait()
        ended.set()

    comfy.interrupt_at, comfy.cancel_points = 3, 0
    with pytest.raises(InterruptProcessingException):
        module.run_cancellable(long_call)
    assert comfy.cancel_points == 3 and not ended.is_set()  # nobody waited for the call
    may_end.set()
    assert ended.wait(60)
    comfy.interrupt_at = None
    assert module.run_cancellable(lambda a, b: a + b, 1, b=2) == 3
    for error in (TimeoutError("own"), ValueError("own"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            module.run_cancellable(raising, error)


def raising(error):
    raise error


def test_inputs_are_never_changed(comfy, model, structure, latent, ball):
    image, mask = picture(2), torch.rand(2, 80, 96).round()
    values = {"image": image, "mask": mask, "structure": structure, "latent": latent, "mesh": ball}
    weights = {name: patcher.model.state_dict() for name, patcher in model.patchers.items()}
    before = {name: digest(value.__dict__ if name == "mesh" else value) for name, value in values.items()}
    weights_before = digest(weights)
    comfy.run("D3DS2RemoveBackground", image=image, mask=mask, invert_mask=True)
    comfy.run("D3DS2SparseStructureSample", model=model, image=image)
    comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=image[:1])
    comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent, keep_largest=True)
    comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=ball)
    comfy.run("D3DS2StructureFromMesh", model=model, mesh=ball)
    comfy.run("D3DS2MeshExport", mesh=ball, target_faces=50, up_axis="Z")
    assert before == {name: digest(value.__dict__ if name == "mesh" else value) for name, value in values.items()}
    assert weights_before == digest(weights)
    assert set(vars(structure)) == {
        "coords",
        "resolution",
        "batch_size",
        "places",
    }  # no tables are kept on what ComfyUI caches


def digest(value) -> str:
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def test_the_memory_manager_loads_what_runs_with_room_for_its_tokens(comfy, model, structure, latent):
    comfy.run("D3DS2SparseStructureSample", model=model, image=picture())
    comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())
    comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(), guidance_scale=1.0)
    comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)
    names, sizes = zip(*comfy.loads, strict=True)
    assert names[0] == ["ImageEncoder", "StructureDiT", "StructureVAE"]
    assert names[1] == names[2] == ["ImageEncoder", "LatentDiT"] and names[3] == ["SDFVAE"]
    assert sizes[1] > sizes[2] > 0
    bytes_of = comfy.module("d3ds2.networks.activation_memory")
    tokens, dit = len(structure.coords), model.pipeline.stages[0].latent_dit
    views = bytes_of.image_tokens_bytes(model.pipeline.image_encoder.config, 1, torch.float32)
    assert sizes[1] == views + bytes_of.latent_dit_bytes(dit.config, 2 * tokens, torch.float32, torch.device("cpu"))
    assert model.patcher.model is dit and len(model.get_models()) == 5
    weights = [tensor for patcher in model.get_models() for tensor in patcher.model.state_dict().values()]
    assert not any(tensor.is_inference() for tensor in weights)  # those could not be unloaded between two prompts


@pytest.mark.parametrize(
    ("precision", "supports", "networks", "vaes"),
    [
        ("auto", {torch.float32}, torch.float32, torch.float32),
        ("auto", {torch.bfloat16, torch.float16}, torch.bfloat16, torch.float16),
        ("auto", {torch.float16}, torch.float16, torch.float16),
        ("fp32", {torch.bfloat16}, torch.float32, torch.float32),
        ("bf16", {torch.float32}, torch.bfloat16, torch.bfloat16),
        ("fp16", {torch.float32}, torch.float16, torch.float16),
    ],
)
def test_precision(comfy, monkeypatch, precision, supports, networks, vaes):
    monkeypatch.setattr(comfy, "supports", supports)
    model = comfy.run("LoadD3DS2Model", model="random", precision=precision)[0]
    dtypes = {name: next(patcher.model.parameters()).dtype for name, patcher in model.patchers.items()}
    assert dtypes == dict.fromkeys(dtypes, networks) | {"structure_vae": vaes, "sdf_vae": vaes}


def test_an_unloaded_network_leaves_the_device_whole(comfy):
    """This includes parameters beside submodules, which ComfyUI's dynamic patcher leaves behind."""
    for patcher in comfy.run("LoadD3DS2Model", model="random")[0].get_models():
        patcher.offload_device = torch.device("meta")
        patcher.detach(unpatch_all=False)
        assert {p.device.type for p in patcher.model.parameters()} == {"cpu"}
        patcher.detach()
        assert {p.device.type for p in patcher.model.parameters()} == {"meta"}


def test_a_memory_budget_changes_nothing_but_rounding(comfy, model, latent, mesh):
    chunked = comfy.module("d3ds2.networks.chunked_decode")
    size = model.pipeline.stages[0].sdf_vae.config.hidden_size
    kept = chunked.kept_bytes(size, len(latent.latents), torch.float32, torch.device("cpu"))
    budget = (kept + 2 * 343 * chunked.latent_bytes(size, torch.float32) + 1) / (1 << 30)
    sdf = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[1]
    again = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent, memory_budget_gb=budget)[1]
    torch.testing.assert_close(again.values, sdf.values, atol=1e-4, rtol=0)


def test_when_the_device_is_full_decoding_tries_once_more_in_smaller_chunks(comfy, model, latent, mesh, monkeypatch):
    chunked = comfy.module("d3ds2.networks.chunked_decode")
    decode, budgets = chunked.decode_in_chunks, []

    def full_at_first(*arguments):
        budgets.append(arguments[3])
        if len(budgets) == 1:
            raise torch.OutOfMemoryError("full")
        return decode(*arguments)

    monkeypatch.setattr(chunked, "decode_in_chunks", full_at_first)
    made = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent, memory_budget_gb=1.0)[0]
    assert budgets == [1 << 30, 1 << 29] and torch.equal(made.vertices, mesh.vertices)

    def always_full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(chunked, "decode_in_chunks", always_full)
    with pytest.raises(torch.OutOfMemoryError):  # ComfyUI reports it in its own words
        comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)


def test_a_surface_too_large_for_the_device_is_extracted_on_the_cpu(comfy, model, latent, mesh, monkeypatch):
    made, extract = [], model.pipeline.blocks_to_meshes

    def full_at_first(blocks, *options):
        made.append(blocks)
        if len(made) == 1:
            raise torch.OutOfMemoryError("full")
        return extract(blocks, *options)

    monkeypatch.setattr(model.pipeline, "blocks_to_meshes", full_at_first)
    again = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
    assert len(made) == 2 and made[1].values.device.type == "cpu" and torch.equal(again.vertices, mesh.vertices)

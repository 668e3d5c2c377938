"""The nodes over stand-ins of ComfyUI: what they make, what they show, how they are stopped, what they leave alone."""

import hashlib
import pickle
import threading

import numpy as np
import pytest
import torch
import trimesh

from d3ds2.images.foreground import cut_out
from d3ds2.meshes.mesh import Mesh
from d3ds2.pipeline import load_pipeline
from tests.support.comfy_stand_ins import MESH, ComfyUI, InterruptProcessingException, PaddedMESH
from tests.support.tiny_model import draw_object


@pytest.fixture(autouse=True)
def fresh(comfy):
    comfy.progress.clear(), comfy.texts.clear()
    comfy.loads.clear()
    comfy.interrupt_at, comfy.cancel_points, comfy.total_memory = None, 0, 64 << 30


@pytest.fixture(scope="module")
def model(comfy):
    return comfy.run("LoadD3DS2Model", model="random")[0]


@pytest.fixture(scope="module")
def structure(comfy, model):
    return comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), seed=5)[0]


@pytest.fixture(scope="module")
def latent(comfy, model, structure):
    return comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(), seed=5)[0]


@pytest.fixture(scope="module")
def mesh(comfy, model, latent):
    return comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]


@pytest.fixture(scope="module")
def ball(comfy):
    """A mesh from elsewhere, not centred."""
    sphere = trimesh.creation.icosphere(3)
    vertices = np.asarray(sphere.vertices, np.float32) * [0.2, 0.3, 0.1] + 0.5
    return MESH(torch.from_numpy(vertices).float()[None], torch.from_numpy(np.asarray(sphere.faces))[None])


def picture(count: int = 1, mode: str = "RGBA") -> torch.Tensor:
    """IMAGE (count, 80, 96, 3 or 4), each a different object."""
    images = [np.asarray(draw_object(mode=mode).rotate(90 * i)) for i in range(count)]
    return torch.from_numpy(np.stack(images)).float() / 255


def digest(value) -> str:
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def test_the_chain_of_nodes_is_the_pipeline_bit_for_bit(comfy, mesh):
    with torch.inference_mode():
        expected = load_pipeline(comfy.folder / "models" / "direct3d_s2" / "random").generate(draw_object(), seed=5)
    assert mesh.vertices[0].numpy().tobytes() == expected.vertices.tobytes()
    assert mesh.faces[0].numpy().tobytes() == expected.faces.tobytes()
    assert mesh.vertices.dtype == torch.float32 and mesh.faces.dtype == torch.int64
    torch.testing.assert_close(mesh.normals[0], torch.from_numpy(expected.normals))


def test_a_plain_background_does_without_an_alpha_channel(comfy, model):
    with torch.inference_mode():
        pipeline = load_pipeline(comfy.folder / "models" / "direct3d_s2" / "random")
        tokens = pipeline.encode_image([cut_out(draw_object(mode="RGB"), method="plain")])
        expected = pipeline.sample_structure(tokens, [1])
    made = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(mode="RGB"), seed=1)
    assert torch.equal(made[0].coords, expected.coords)


def test_samples_of_a_batch_are_those_alone(comfy, model):
    images = picture(3)
    together = comfy.run("D3DS2SparseStructureSample", model=model, image=images, seed=2**64 - 2)
    latents = comfy.run("D3DS2SSADiTSample", model=model, structure=together[0], image=images, seed=9)[0]
    meshes = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latents)[0]
    latents = latents.latents.split(together[0].voxels().counts)
    for i, seed in enumerate((2**64 - 2, 2**64 - 1, 0)):
        alone = comfy.run("D3DS2SparseStructureSample", model=model, image=images[i : i + 1], seed=seed)
        assert torch.equal(together[0].voxels().sample(i).coords, alone[0].coords)
        assert torch.equal(together[1].data[i], alone[1].data[0])
        latent = comfy.run("D3DS2SSADiTSample", model=model, structure=alone[0], image=images[i : i + 1], seed=9 + i)[0]
        assert torch.equal(latent.latents, latents[i])
        mesh = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
        count = int(meshes.vertex_counts[i])
        assert torch.equal(meshes.vertices[i, :count], mesh.vertices[0]) and not meshes.vertices[i, count:].any()
        assert torch.equal(meshes.faces[i, : meshes.face_counts[i]], mesh.faces[0])
    assert len(together[2].split("+")) == 3 and together[2].endswith("tokens at 8³")


def test_one_image_guides_several_structures(comfy, model):
    structure = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(2))[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    assert len(latent.latents) == len(structure.coords)
    with pytest.raises(ValueError, match="expected 1 image or 2, one a structure, got 3"):
        comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture(3))


def test_voxels_stand_as_core_reads_them(comfy, model, structure):
    voxel = comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), seed=5)[1]
    assert voxel.data.shape == (1, 8, 8, 8) and voxel.data.sum() == len(structure.coords)
    for _, x, y, z in structure.coords.tolist():
        assert voxel.data[0, z, y, x] == 1


def test_zero_means_what_the_model_was_made_with(comfy, model):
    def run(**inputs):
        return comfy.run("D3DS2SparseStructureSample", model=model, image=picture(), **inputs)[0].coords

    sampling = model.pipeline.sampling
    own = run(steps=sampling.structure_steps, guidance_scale=sampling.structure_guidance)
    assert torch.equal(run(), own)
    assert not torch.equal(run(guidance_scale=1.0), own)
    run(steps=5)
    assert comfy.progress[-1][:2] == (5, 5)


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


class Clock:
    """Stands for the module `time`: seconds pass only when told."""

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
    assert 2 <= len(drawn) <= 5  # a fifth of the time; without the limit 50
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


def test_a_long_call_is_left_at_the_next_look_at_the_button(comfy):
    module = comfy.module("nodes.comfy.progress")
    assert module.POLL <= 0.1  # seconds from one look to the next
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
    assert set(vars(structure)) == {"coords", "resolution", "batch_size"}  # no tables gather on what ComfyUI caches


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
    assert sizes[1] == bytes_of.latent_dit_bytes(dit.config, 2 * tokens, torch.float32)
    assert model.patcher.model is dit and len(model.get_models()) == 5
    weights = [tensor for patcher in model.get_models() for tensor in patcher.model.state_dict().values()]
    assert not any(tensor.is_inference() for tensor in weights)  # such could not be unloaded between two prompts


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


def test_half_precision_runs_through_all_nodes(comfy, ball):
    model = comfy.run("LoadD3DS2Model", model="random", precision="bf16")[0]
    structure = comfy.run("D3DS2SparseStructureSample", model=model, image=picture())[0]
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    mesh = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
    assert latent.latents.dtype == torch.float32 and mesh.faces.shape[1] > 100
    assert len(comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=ball)[0].latents) > 0


def test_an_unloaded_network_leaves_the_device_whole(comfy):
    """Parameters beside submodules too, which ComfyUI's dynamic patcher leaves behind."""
    for patcher in comfy.run("LoadD3DS2Model", model="random")[0].get_models():
        patcher.offload_device = torch.device("meta")
        patcher.detach(unpatch_all=False)
        assert {p.device.type for p in patcher.model.parameters()} == {"cpu"}
        patcher.detach()
        assert {p.device.type for p in patcher.model.parameters()} == {"meta"}


def test_decoding_options_reach_the_surface(comfy, model, latent, mesh):
    def run(**inputs):
        return comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent, **inputs)

    everything = run(min_component=0.0)[0]
    assert everything.faces.shape[1] >= mesh.faces.shape[1] >= run(keep_largest=True)[0].faces.shape[1]
    assert not torch.equal(run(level=0.3)[0].vertices[0, :10], mesh.vertices[0, :10])
    sdf = run()[1]
    assert sdf.values.shape == (len(latent.latents), 8, 8, 8) and sdf.resolution == 64
    assert torch.equal(sdf.block_coords, latent.structure.coords)  # a token is a block
    for value in (sdf, latent, latent.structure):  # what newer versions weigh in their cache
        assert all(isinstance(tensor, torch.Tensor) for tensor in value._comfy_cache_tensors())


def test_a_mesh_goes_through_the_vae_and_into_a_structure(comfy, model, ball):
    latent = comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=ball)[0]
    structure, voxel, text = comfy.run("D3DS2StructureFromMesh", model=model, mesh=ball).args
    assert torch.equal(structure.coords, latent.structure.coords) and voxel.data.sum() == len(structure.coords)
    assert text == f"{len(structure.coords):,} tokens at 8³"
    # every vertex of the surface lies in a voxel of the structure
    low, high = ball.vertices[0].amin(0), ball.vertices[0].amax(0)
    fitted = (ball.vertices[0] - (low + high) / 2) * (1.9 / (high - low).max())
    occupied = {tuple(c) for c in structure.coords[:, 1:].tolist()}
    assert {tuple(c) for c in ((fitted + 1) * 4).int().tolist()} <= occupied
    decoded = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[0]
    assert decoded.faces.shape[1] > 0
    refined = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    assert refined.structure is structure


def test_a_batch_of_meshes_in_and_out(comfy, model, ball):
    module = comfy.module("nodes.comfy.mesh_socket")
    box = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * 0.5
    faces = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6]])
    meshes = [module.from_socket(ball)[0], Mesh(box, faces, box)]
    both = module.to_socket(meshes)
    assert both.vertex_counts.tolist() == [ball.vertices.shape[1], 8]
    for before, after in zip(meshes, module.from_socket(both), strict=True):
        for name in ("vertices", "faces", "normals"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    structure = comfy.run("D3DS2StructureFromMesh", model=model, mesh=both)[0]
    alone = comfy.run("D3DS2StructureFromMesh", model=model, mesh=module.to_socket(meshes[1:]))[0]
    assert structure.batch_size == 2 and torch.equal(structure.voxels().sample(1).coords, alone.coords)
    assert comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=both)[0].structure.batch_size == 2


def test_meshes_of_newer_versions_carry_their_counts_as_arguments(tmp_path):
    comfy = ComfyUI(tmp_path, PaddedMESH, "another pack")
    try:
        module = comfy.module("nodes.comfy.mesh_socket")
        triangle = np.eye(3, dtype=np.float32)
        meshes = [Mesh(triangle, np.array([[0, 1, 2]] * n), triangle) for n in (1, 2)]
        socket = module.to_socket(meshes)
        assert socket.face_counts.tolist() == [1, 2] and socket.vertex_counts.tolist() == [3, 3]
        assert module.to_socket(meshes[:1]).face_counts is None
    finally:
        comfy.close()


def test_a_memory_budget_changes_nothing_but_rounding(comfy, model, latent, mesh):
    chunked = comfy.module("d3ds2.networks.chunked_decode")
    size = model.pipeline.stages[0].sdf_vae.config.hidden_size
    kept = chunked.kept_bytes(size, len(latent.latents), torch.float32, torch.device("cpu"))
    budget = (kept + 2 * 343 * chunked.latent_bytes(size, torch.float32) + 1) / (1 << 30)
    sdf = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent)[1]
    again = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent, memory_budget_gb=budget)[1]
    torch.testing.assert_close(again.values, sdf.values, atol=1e-4, rtol=0)


def test_a_full_device_is_tried_once_more_in_smaller_chunks(comfy, model, latent, mesh, monkeypatch):
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
    with pytest.raises(torch.OutOfMemoryError):  # ComfyUI has its own words for it
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

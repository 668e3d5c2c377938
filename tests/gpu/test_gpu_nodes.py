"""On a CUDA device: the nodes run there, and take no more memory than they request from the memory manager."""

import pytest
import torch

from d3ds2.networks import activation_memory as estimate
from d3ds2.networks.chunked_decode import kept_bytes, latent_bytes
from tests.networks.test_activation_memory import fresh, image_tokens, sphere
from tests.support.tiny_model import picture

pytestmark = pytest.mark.gpu


def peak(function) -> int:
    """Return the peak bytes that the second run of `function` allocates on the device."""
    with torch.no_grad():
        function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module")
def comfy_device():
    return "cuda"


@pytest.mark.parametrize("model", ["random", "tiny"])
def test_the_nodes_run_and_leave_their_values_on_the_cpu(comfy, model):
    model = comfy.run("LoadD3DS2Model", model=model)[0]
    structure, voxel, _ = comfy.run("D3DS2SparseStructureSample", model=model, image=picture()).args
    latent = comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0]
    mesh, sdf = comfy.run("D3DS2VAEDecodeSDF", model=model, latent=latent).args
    encoded = comfy.run("D3DS2VAEEncodeMesh", model=model, mesh=mesh)[0]
    again = comfy.run("D3DS2StructureFromMesh", model=model, mesh=mesh)[0]
    values = [structure.coords, voxel.data, latent.latents, mesh.vertices, mesh.faces, sdf.values, encoded.latents]
    assert {value.device.type for value in values} == {"cpu"} and latent.latents.dtype == torch.float32
    assert next(model.pipeline.stages[0].latent_dit.parameters()).device.type == "cuda"
    assert mesh.faces.shape[1] > 100 and again.voxels().counts[0] > 10
    for patcher in model.get_models():
        patcher.detach(unpatch_all=False)
    assert next(model.pipeline.stages[0].latent_dit.parameters()).device.type == "cuda"
    for patcher in model.get_models():
        patcher.detach()
    assert {p.device.type for patcher in model.get_models() for p in patcher.model.parameters()} == {"cpu"}
    assert comfy.run("D3DS2SSADiTSample", model=model, structure=structure, image=picture())[0].latents.isfinite().all()


@pytest.mark.parametrize("model", ["random", "tiny"])
def test_the_estimates_cover_the_memory_taken(comfy, model):
    """Check the estimates at sizes where the workspace hardly counts: large enough, but not many times too large."""
    pipeline = comfy.run("LoadD3DS2Model", model=model)[0].pipeline
    resolution = 64
    voxels = sphere(resolution)
    tokens = image_tokens(pipeline.image_encoder.config.hidden_size).to("cuda")
    stage = pipeline.stages[0]
    dit, vae = stage.latent_dit.cuda(), stage.sdf_vae.cuda()
    dtype = next(dit.parameters()).dtype
    coarse = fresh(voxels).to("cuda")
    x_t, t = torch.randn(len(coarse), 16, device="cuda"), torch.full((1,), 0.5, device="cuda")
    taken = peak(lambda: dit(x_t, t, fresh(coarse), tokens))
    none, allowed = (
        estimate.latent_dit_bytes(dit.config, count, dtype, torch.device("cuda")) for count in (0, len(coarse))
    )
    assert taken <= allowed <= 6 * taken + none, ("latent_dit", taken, allowed)

    size, dtype = vae.config.hidden_size, next(vae.parameters()).dtype
    budget = kept_bytes(size, len(coarse), dtype, torch.device("cuda")) + 2 * latent_bytes(size, dtype) * len(coarse)
    taken = peak(lambda: pipeline.decode_blocks(x_t, fresh(coarse), budget))
    assert taken <= budget, ("decoding", taken, budget)

    fine = fresh(voxels).subdivide()[0].subdivide()[0].subdivide()[0].to("cuda")
    sdf = torch.rand(len(fine), 1, device="cuda")
    taken = peak(lambda: vae.encode(sdf, fresh(fine)))
    allowed = estimate.sdf_encode_bytes(vae.config, len(fine), dtype)
    assert taken <= allowed <= 6 * taken + estimate.WORKSPACE, ("encoding", taken, allowed)

"""Layer norm with modulation and the gated residual: kernels against their definitions, outputs and gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from d3ds2.geometry.segments import samples_of
from d3ds2.kernels.devices import HAS_TRITON
from d3ds2.kernels.modulation import (
    affine_norm,
    affine_norm_reference,
    gated_sum,
    gated_sum_reference,
    modulated_norm_reference,
    sum_and_affine_norm,
    sum_and_affine_norm_reference,
    sum_and_norm,
    sum_and_norm_reference,
)
from d3ds2.networks.latent_dit import LatentBlock, LatentDiTConfig
from tests.support.random_voxels import random_voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, conftest.py sets TRITON_INTERPRET=1
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
EPS = 1e-6
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # to which the interpreter truncates
CASES = [
    pytest.param([70, 0, 5, 41], 48, id="ragged"),
    pytest.param([5, 9, 0], 100, id="last-sample-empty"),
    pytest.param([150], 64, id="one-sample"),
    pytest.param([1], 7, id="one-token"),
    pytest.param([0, 0], 16, id="no-token"),
]


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new tensors with NaN, for what a kernel leaves unwritten; programs take their rows in several steps."""
    from d3ds2.kernels import modulation_triton

    for name in ("NORM", "NORM_BACKWARD", "SUM_BACKWARD", "GATE", "GATE_BACKWARD"):
        monkeypatch.setattr(modulation_triton, name, modulation_triton.RowTile(32, 512, 4))

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def problem(counts, C):
    """The rows of the samples; h, parameters of a sample in the middle of a chunk, x and the gradient of the result."""
    samples = samples_of(random_voxels(counts, 16).to(DEVICE))
    h, x, dout = (torch.randn(sum(counts), C, dtype=torch.float64) for _ in range(3))
    parameters = torch.randn(len(counts), 6 * C, dtype=torch.float64)
    return samples, 3 * h + 1, parameters, x, dout


def outputs_and_gradients(function, inputs, dout, dtype):
    """In `dtype`, on the device; the results in float64 on the CPU."""
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, inputs, dout.to(DEVICE, dtype))
    assert [g.dtype for g in gradients] == [dtype] * len(inputs)
    return [x.detach().double().cpu() for x in (out, *gradients)]


def check(kernel, definition, inputs, dout, dtype):
    """From the definition in float64 it is at most twice as far as the definition in `dtype`, and a rounding.

    In float32 that is four roundings: sums over tokens in another order, and the device's root.
    """
    roundings = 4 if dtype == torch.float32 else 0.25
    rounded = [x.to(dtype).double() for x in inputs]
    expected = outputs_and_gradients(definition, rounded, dout.to(dtype).double(), torch.float64)
    usual = outputs_and_gradients(definition, rounded, dout, dtype)
    actual = outputs_and_gradients(kernel, rounded, dout, dtype)
    for name, a, u, e in zip(("out", "first", "second", "third", "fourth"), actual, usual, expected, strict=False):
        allowed = 2 * (u - e).norm() + roundings * torch.finfo(dtype).eps * e.norm()
        assert (a - e).norm() <= allowed, f"{name}: {(a - e).norm():.3g}, allowed {allowed:.3g}"
        assert a.shape == e.shape


def joined(pair):
    """Both results with weights of their own, so that one gradient reaches both."""
    return pair[0] + 2 * pair[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "C"), CASES)
@pytest.mark.parametrize("added", ["nothing", "x", "gated x"])
def test_sum_and_norm(counts, C, added, dtype, poisoned):
    from d3ds2.kernels.modulation_triton import sum_and_norm_triton

    samples, h, parameters, x, dout = problem(counts, C)

    def inputs(h, parameters, x):
        gate, _, _, shift, scale, _ = parameters.chunk(6, dim=-1)
        return h, gate if added == "gated x" else None, x if added != "nothing" else None, shift, scale, samples, EPS

    definition = lambda *tensors: joined(sum_and_norm_reference(*inputs(*tensors)))  # noqa: E731
    kernel = lambda *tensors: joined(sum_and_norm_triton(*inputs(*tensors), dtype, dtype))  # noqa: E731
    if added == "nothing":
        definition, kernel = ((lambda h, p, f=f: f(h, p, None)) for f in (definition, kernel))
        check(kernel, definition, (h, parameters), dout, dtype)
    else:
        check(kernel, definition, (h, parameters, x), dout, dtype)


@pytest.mark.parametrize("unused", [0, 1])
def test_a_result_that_nothing_uses_has_no_gradient(unused, poisoned):
    from d3ds2.kernels.modulation_triton import sum_and_norm_triton

    samples, h, parameters, x, dout = problem([9, 20], 24)
    inputs = [t.to(DEVICE, torch.float32).requires_grad_() for t in (h, *parameters.chunk(6, dim=-1)[:3], x)]
    h, gate, shift, scale, x = inputs
    actual = sum_and_norm_triton(h, gate, x, shift, scale, samples, EPS, h.dtype, h.dtype)[1 - unused]
    wanted = sum_and_norm_reference(h, gate, x, shift, scale, samples, EPS)[1 - unused]
    dout = dout.to(DEVICE, torch.float32)
    gradients = torch.autograd.grad(actual, inputs, dout)
    for gradient, of_definition in zip(
        gradients, torch.autograd.grad(wanted, inputs, dout, allow_unused=True), strict=True
    ):
        of_definition = torch.zeros_like(gradient) if of_definition is None else of_definition
        torch.testing.assert_close(gradient, of_definition, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "C"), CASES)
def test_gated_sum(counts, C, dtype, poisoned):
    from d3ds2.kernels.modulation_triton import gated_sum_triton

    samples, h, parameters, x, dout = problem(counts, C)
    definition = lambda h, gate, x: gated_sum_reference(h, gate.chunk(6, dim=-1)[2], x, samples)  # noqa: E731
    kernel = lambda h, gate, x: gated_sum_triton(h, gate.chunk(6, dim=-1)[2], x, samples, dtype)  # noqa: E731
    check(kernel, definition, (h, parameters, x), dout, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(150, 48), (2, 20, 33), (0, 8)])
def test_affine_norm(shape, dtype, poisoned):
    from d3ds2.kernels.modulation_triton import affine_norm_triton

    h, dout = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], dtype=torch.float64) for _ in range(2))
    definition = lambda h, weight, bias: affine_norm_reference(h, weight, bias, EPS)  # noqa: E731
    kernel = lambda h, weight, bias: affine_norm_triton(h, weight, bias, EPS, dtype)  # noqa: E731
    check(kernel, definition, (3 * h + 1, weight, bias), dout, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "C"), CASES)
def test_sum_and_affine_norm(counts, C, dtype, poisoned):
    from d3ds2.kernels.modulation_triton import sum_and_norm_triton

    samples, h, _, x, dout = problem(counts, C)
    weight, bias = torch.randn(2, C, dtype=torch.float64)

    def kernel(h, x, weight, bias):
        rows = [vector.expand(len(samples), -1) for vector in (bias, weight)]
        return joined(sum_and_norm_triton(h, None, x, *rows, samples, EPS, dtype, dtype, affine=True))

    definition = lambda h, x, *p: joined(sum_and_affine_norm_reference(h, None, x, *p, samples, EPS))  # noqa: E731
    check(kernel, definition, (h, x, weight, bias), dout, dtype)


def test_a_large_mean_does_not_cancel():
    """Statistics from sums and sums of squares would."""
    from d3ds2.kernels.modulation_triton import affine_norm_triton

    h = torch.randn(20, 64, device=DEVICE) + 3e3
    one, zero = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    out = affine_norm_triton(h, one, zero, EPS, torch.float32)
    expected = affine_norm_reference(h.double(), one, zero, EPS)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=0)


def test_mixed_dtypes():
    """As in training: h is float32, the parameters and x are bfloat16; every gradient has its input's dtype."""
    from d3ds2.kernels.modulation_triton import gated_sum_triton, sum_and_norm_triton

    samples, h, parameters, x, dout = problem([30, 0, 12], 40)
    h, dout = h.to(DEVICE, torch.float32).requires_grad_(), dout.to(DEVICE, torch.float32)
    shift, scale, gate = (p.to(DEVICE, torch.bfloat16).requires_grad_() for p in parameters.chunk(6, dim=-1)[:3])
    x = x.to(DEVICE, torch.bfloat16).requires_grad_()
    total, normed = sum_and_norm_triton(h, gate, x, shift, scale, samples, EPS, torch.float32, torch.bfloat16)
    summed = gated_sum_triton(h, gate, x, samples, torch.float32)
    exact = sum_and_norm_reference(h, gate, x, shift.float(), scale.float(), samples, EPS)
    of_norm = (h, gate, x, shift, scale), torch.bfloat16
    for actual, wanted, (inputs, dtype) in (
        (total, exact[0], ((h, gate, x), torch.float32)),
        (normed, exact[1], of_norm),
        (summed, gated_sum_reference(h, gate, x, samples), ((h, gate, x), torch.float32)),
    ):
        assert actual.dtype == dtype
        loose, tight = {"atol": 0.05, "rtol": 0.02}, {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(actual.float(), wanted, **(tight if dtype == torch.float32 else loose))
        gradients = torch.autograd.grad(actual, inputs, dout.to(dtype), retain_graph=True)
        expected = torch.autograd.grad(wanted, inputs, dout.to(dtype).float(), retain_graph=True)
        for gradient, of_definition, of in zip(gradients, expected, inputs, strict=True):
            assert gradient.dtype == of.dtype
            torch.testing.assert_close(gradient, of_definition, **(tight if of.dtype == torch.float32 else loose))


@pytest.mark.parametrize("counts", [[20], [12, 0, 9]])
@pytest.mark.parametrize("share_modulation", [False, True])
def test_a_block_with_its_kernels(counts, share_modulation, monkeypatch):
    """Output, and through a checkpoint every gradient, of a block that takes the kernels and of one that does not."""
    config = LatentDiTConfig(
        hidden_size=32,
        depth=1,
        num_heads=4,
        num_kv_heads=2,
        context_size=12,
        top_k=2,
        share_modulation=share_modulation,
    )
    block, voxels = LatentBlock(config, 0).to(DEVICE), random_voxels(counts, 16).to(DEVICE)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    h, dout = (torch.randn(len(voxels), 32, device=DEVICE) for _ in range(2))
    embedding = torch.randn(len(counts), 192 if share_modulation else 32, device=DEVICE)
    context, lengths = torch.randn(4 * len(counts), 32, device=DEVICE), [4] * len(counts)
    context_cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    arguments = h.requires_grad_(), embedding.requires_grad_(), voxels, context, context_cu, lengths
    inputs = [h, embedding, *block.parameters()]

    def step():
        out = checkpoint(block, *arguments, use_reentrant=False)
        return out, *torch.autograd.grad(out, inputs, dout)

    monkeypatch.setattr("d3ds2.kernels.modulation.half_on_triton", lambda h: False)
    expected = step()
    monkeypatch.setattr("d3ds2.kernels.modulation.half_on_triton", lambda h: True)
    actual = step()
    assert "_GatedSum" in type(actual[0].grad_fn).__name__
    tolerance = 1e-6 if DEVICE == "cpu" else 1e-3  # where the kernels of attention multiply in TF32
    largest = max(e.abs().max() for e in expected).item()
    for a, e in zip(actual, expected, strict=True):  # some vanish but for rounding, as that of the keys' bias
        torch.testing.assert_close(a, e, atol=tolerance * largest, rtol=100 * tolerance)


def on_gpu(counts, C, dtype):
    samples, h, parameters, x, dout = problem(counts, C)
    return samples, *(t.to("cuda", dtype) for t in (h, *parameters.chunk(6, dim=-1)[:3], x, dout))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("counts", "C"), [([3000, 0, 500, 37], 1024), ([2500], 1024), ([700, 1], 1536), ([300], 3000)])
def test_on_the_gpu_by_its_public_names(counts, C, dtype):
    samples, h, parameters, x, dout = problem(counts, C)
    gate = parameters[:, :C]
    norm, reference = (
        lambda h, gate, x, shift, scale, f=f: joined(f(h, gate, x, shift, scale, samples, EPS))
        for f in (sum_and_norm, sum_and_norm_reference)
    )
    check(norm, reference, (h, gate, x, parameters[:, C : 2 * C], parameters[:, 2 * C : 3 * C]), dout, dtype)
    summed, reference = (lambda h, gate, x, f=f: f(h, gate, x, samples) for f in (gated_sum, gated_sum_reference))
    check(summed, reference, (h, gate, x), dout, dtype)
    affine, reference = (lambda h, w, b, f=f: f(h, w, b, EPS) for f in (affine_norm, affine_norm_reference))
    check(affine, reference, (h, parameters[0, :C], parameters[0, C : 2 * C]), dout, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None])
def test_dtypes_are_those_of_torch(autocast):
    """With and without autocast, for every pair of dtypes of tokens and parameters that autocast takes.

    Under autocast a norm has its dtype, and torch's is float32.
    """
    samples, *tensors = on_gpu([40, 3], 64, torch.float32)
    half = autocast or torch.bfloat16
    for first in (torch.float32, half):
        for second in (torch.float32, half):
            h, (shift, scale, gate, x) = tensors[0].to(first), (t.to(second) for t in tensors[1:5])
            with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
                pairs = (
                    *zip(
                        sum_and_norm(h, gate, x, shift, scale, samples, EPS),
                        sum_and_norm_reference(h, gate, x, shift, scale, samples, EPS),
                        strict=True,
                    ),
                    *zip(
                        sum_and_affine_norm(h, None, x, shift[0], scale[0], samples, EPS),
                        sum_and_affine_norm_reference(h, None, x, shift[0], scale[0], samples, EPS),
                        strict=True,
                    ),
                    (gated_sum(h, gate, x, samples), gated_sum_reference(h, gate, x, samples)),
                    (affine_norm(h, shift[0], scale[0], EPS), affine_norm_reference(h, shift[0], scale[0], EPS)),
                )
            for number, (actual, wanted) in enumerate(pairs):
                assert actual.dtype == (autocast if autocast and number in (1, 3, 5) else wanted.dtype)
                torch.testing.assert_close(actual.float(), wanted.float(), atol=0.1, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[3000], [1000, 0, 2000]])
def test_equal_bits_again_and_from_a_graph(counts):
    with torch.cuda.stream(torch.cuda.Stream()):
        samples, h, shift, scale, gate, x, dout = on_gpu(counts, 1024, torch.float16)
        inputs = [t.detach().requires_grad_() for t in (h, shift, scale, gate, x)]
        h, shift, scale, gate, x = inputs

        def step():
            total, normed = sum_and_norm(h, gate, x, shift, scale, samples, EPS)
            out = gated_sum(normed, gate, total, samples)
            return out.detach(), *torch.autograd.grad(out, inputs, dout)

        expected = step()
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            results = step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("counts", "C"), CASES)
def test_samples_in_turn_without_a_gradient(counts, C, dtype):
    samples, h, parameters, x, _ = problem(counts, C)
    h, x = (rows.to(DEVICE, dtype) for rows in (h, x))
    shift, scale, gate = parameters.to(DEVICE, dtype).chunk(6, dim=1)[:3]
    for operation, *inputs in ((modulated_norm_reference, h, shift, scale), (gated_sum_reference, h, gate, x)):
        more = [EPS] if operation is modulated_norm_reference else []
        expected = operation(*inputs, samples, *more)
        with torch.no_grad():
            assert torch.equal(operation(*inputs, samples, *more), expected)
            inputs[0] = inputs[0].float()  # the dtypes may differ
            assert operation(*inputs, samples, *more).dtype == torch.float32


@pytest.mark.parametrize("B", [1, 3])
def test_dense_samples(B, monkeypatch):
    """Samples of equal length, (B, L, C): kernels against the definitions, outputs and gradients."""
    h, x = (torch.randn(B, 10, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    gate, shift, scale = (torch.randn(B, 24, device=DEVICE, requires_grad=True) for _ in range(3))
    weight, bias = (torch.randn(24, device=DEVICE, requires_grad=True) for _ in range(2))
    inputs = h, x, gate, shift, scale, weight, bias
    dout = torch.randn_like(h)

    def step():
        total, normed = sum_and_norm(h, gate, x, shift, scale, None, EPS)
        total, affine = sum_and_affine_norm(total, None, normed, weight, bias, None, EPS)
        out = gated_sum(total, gate, affine, None)
        return out, *torch.autograd.grad(out, inputs, dout)

    monkeypatch.setattr("d3ds2.kernels.modulation.half_on_triton", lambda h: False)
    expected = step()
    monkeypatch.setattr("d3ds2.kernels.modulation.half_on_triton", lambda h: True)
    actual = step()
    assert "View" in type(actual[0].grad_fn).__name__  # of the rows of all samples
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)

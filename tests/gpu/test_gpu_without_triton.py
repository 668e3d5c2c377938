"""Sparse convolution and group norm on a CUDA device without Triton.  python -m pytest tests -m gpu

The convolution runs by torch alone and, where it is installed, by spconv.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trimesh

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.gpu


def test_a_compiler_that_is_missing_costs_time_and_no_mesh(tmp_path):
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {
        "PATH": str(tmp_path / "empty"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "HOME": str(tmp_path),
    }
    out = tmp_path / "mesh.glb"
    picture = ROOT / "workflows" / "demo_input.png"
    command = [sys.executable, "-m", "d3ds2", str(picture), "-o", str(out), "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if "no Triton" in line]
    assert len(lines) == 1 and "ompiler" in lines[0] and "Remedy: install a C compiler" in lines[0], done.stderr[-3000:]
    assert trimesh.load(out, force="mesh").is_watertight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("counts", [(70_000, 0, 90_001), (50_000,)])
def test_group_norm(counts, dtype, monkeypatch):
    monkeypatch.setattr(group_norm, "SLAB_BYTES", 1 << 20)
    monkeypatch.setattr(group_norm, "half_on_triton", lambda x: False)
    voxels, norm = random_voxels(list(counts), 64), PackedGroupNorm(2, 32)
    x, dout = (torch.randn(len(voxels), 32).to(dtype) for _ in range(2))
    expected = norm_and_gradients(norm.double(), x.double(), voxels, dout.double())
    actual = norm_and_gradients(norm.to("cuda", dtype), x.cuda(), voxels.to("cuda"), dout.cuda())
    for a, e in zip(actual, expected, strict=True):
        assert (a.cpu() - e).abs().max() < (1e-4 if dtype == torch.float32 else 4e-3) * e.abs().max()


def norm_and_gradients(norm, x, voxels, dout):
    x = x.detach().requires_grad_()
    out = norm(x, voxels, silu=True)
    return out, *torch.autograd.grad(out, (x, norm.weight, norm.bias), dout)

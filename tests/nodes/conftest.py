"""A model with random weights, and what the nodes make with it: shared by the tests of a file."""

import numpy as np
import pytest
import torch
import trimesh

from tests.support.comfy_stand_ins import MESH
from tests.support.tiny_model import picture


@pytest.fixture
def fresh(comfy):
    """Forget what earlier tests left in the stand-ins."""
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
    """A mesh that no node made, away from the centre."""
    sphere = trimesh.creation.icosphere(3)
    vertices = np.asarray(sphere.vertices, np.float32) * [0.2, 0.3, 0.1] + 0.5
    return MESH(torch.from_numpy(vertices).float()[None], torch.from_numpy(np.asarray(sphere.faces))[None])

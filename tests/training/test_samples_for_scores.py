"""Shapes that are sampled to be scored: a batch in which some come out empty, and structures that are given."""

import numpy as np
import torch

from d3ds2.geometry.sdf_blocks import SDFBlocks
from d3ds2.geometry.voxels import Voxels
from d3ds2.networks.image_encoder import ImageTokens
from d3ds2.pipeline import EmptyResultError, Pipeline
from d3ds2.storage.model_folder import SamplingConfig
from training.evaluation.generation import sample

R = 64  # voxels per edge


class Moody:
    """A pipeline that samples no voxels for an odd seed, and `seed` voxels for an even one."""

    sampling = SamplingConfig()
    finish = Pipeline.finish

    def sample_structure(self, tokens, seeds, mirrored=None):
        assert mirrored is None or mirrored.batch_size == tokens.batch_size == len(seeds)
        if any(seed % 2 for seed in seeds):
            raise EmptyResultError("empty")
        coords = [[b, 0, 0, z] for b, seed in enumerate(seeds) for z in range(seed)]
        return Voxels(torch.tensor(coords, dtype=torch.int32), R // 8, len(seeds))

    def sample_latents(self, voxels, tokens, seeds):
        return torch.tensor(seeds)[voxels.batch_index, None]

    def decode_blocks(self, latents, voxels):
        fine = voxels.subdivide()[0].subdivide()[0].subdivide()[0]
        return SDFBlocks.of_voxels(latents.repeat_interleave(512, 0) / 10, fine)


def test_empty_structures_are_left_out_of_the_batch():
    tokens = ImageTokens(torch.zeros(3, 1), torch.tensor([[b, 0, 0, 1] for b in range(3)]), torch.ones(3) > 0, 3)
    made = sample(Moody(), tokens, [2, 3, 4])
    assert [len(blocks) for blocks, _ in made] == [2, 0, 4]
    assert [values.shape for _, values in made] == [(2, 8, 8, 8), (0, 8, 8, 8), (4, 8, 8, 8)]
    assert (made[0][1] == np.float16(0.2)).all() and (made[2][1] == np.float16(0.4)).all()
    assert [len(blocks) for blocks, _ in sample(Moody(), tokens, [2, 3, 4], tokens)] == [2, 0, 4]
    together = sample(Moody(), tokens, [2, 6, 4])
    np.testing.assert_array_equal(together[2][0], [[0, 0, z] for z in range(4)])
    assert (together[1][1] == np.float16(0.6)).all()


def test_true_structures_take_the_place_of_sampled_ones():
    tokens = ImageTokens(torch.zeros(2, 1), torch.tensor([[b, 0, 0, 1] for b in range(2)]), torch.ones(2) > 0, 2)
    structures = [np.array([[1, 0, 2], [0, 3, 1]]), np.array([[4, 4, 4]])]
    made = sample(Moody(), tokens, [3, 4], structures=structures)  # no structure is sampled of seed 3
    np.testing.assert_array_equal(made[0][0], [[0, 3, 1], [1, 0, 2]])
    np.testing.assert_array_equal(made[1][0], [[4, 4, 4]])
    assert (made[0][1] == np.float16(0.3)).all() and (made[1][1] == np.float16(0.4)).all()

"""The blocks of a sparse grid: an SDF is stored as blocks of 8³ voxels, and one latent token stands for each."""

BLOCK = 8  # voxels per edge
BLOCK_LAST = BLOCK - 1  # `voxel & BLOCK_LAST` is the voxel's place in its block
BLOCK_BITS = 3  # `voxel >> BLOCK_BITS` is its block
BLOCK_VOXELS = BLOCK**3
MAX_RESOLUTION = 2048  # voxels per edge of the grid

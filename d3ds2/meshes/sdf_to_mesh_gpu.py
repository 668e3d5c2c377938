"""`sdf_to_mesh` for values that lie on a GPU: the same mesh, bit for bit in its faces, made there.

One bit of each voxel goes to the CPU, where the flood fill and the gap closing work on blocks, and comes back. Cubes,
vertices and faces are then found by tensor operations, some blocks at a time. Everything is numbered as in
`marching_cubes`: by owner block, axis or cube, and place.

Sizes:
    R  voxels per edge     G = R / 8  blocks per edge     B  stored blocks     W  owners     V  vertices     F  faces
"""

import numpy as np
import torch
from torch import Tensor

from .fill import fill_from_outside
from .gap_closing import border_of_solid, enclosed_solid_blocks
from .marching_cubes import MARGIN
from .marching_cubes_table import CORNERS, EDGES, marching_cubes_table
from .mesh import Mesh
from .sdf_to_mesh import finish_mesh, owners_of, sdf_to_mesh

CHUNK = 8192  # owners at a time
VERTEX_CHUNK = 1 << 18


def blocks_to_mesh(block_coords: Tensor, values: Tensor, resolution: int, **options) -> Mesh:
    """`device_mesh` of values on a GPU, `sdf_to_mesh` of others."""
    if values.is_cuda:
        return device_mesh(block_coords, values, resolution, **options)
    return sdf_to_mesh(block_coords.numpy(), values.numpy(), resolution, **options)


def device_mesh(
    block_coords: Tensor,
    values: Tensor,
    resolution: int,
    level: float = 0.0,
    min_component: float = 0.0,
    keep_largest: bool = False,
    close_gaps: bool = False,
) -> Mesh:
    """The outer surface where `values` cross `level`, as `sdf_to_mesh` makes it.

    Args:
        block_coords: (B,3) integers in [0, R/8), each block once.
        values: (B,8,8,8) float32 and finite, on any device.
        resolution, level, min_component, keep_largest, close_gaps: see `sdf_to_mesh`.

    Raises:
        ValueError: blocks given twice, or no surface at this level.
    """
    grid, coords = resolution // 8, block_coords.cpu().numpy().astype(np.int64)
    solid = np.zeros((0, 3), np.int64)
    if close_gaps:
        solid = enclosed_solid_blocks(
            coords, lambda axis, layer: (values.select(axis + 1, layer) - level).sum((1, 2)).cpu().numpy(), grid
        )
    rows, words, empty = fill_from_outside(coords, _pack(values >= level), grid, True, solid)
    owners = owners_of(np.concatenate([coords, border_of_solid(coords, solid, grid)]), grid)
    surface = _Surface(owners, values, level, grid, rows, _unpack(words, values.device), empty)
    return finish_mesh(*surface.extract(), min_component, keep_largest)


def _pack(mask: Tensor) -> np.ndarray:
    """(B,8,8,8) bool to the words of a fill, (B,8) uint64 on the CPU."""
    bits = torch.tensor([1 << z for z in range(8)], dtype=torch.uint8, device=mask.device)
    packed = (mask * bits).sum(-1, dtype=torch.uint8).cpu().numpy()  # (B,8,8): bit z of byte y of word x
    return np.ascontiguousarray(packed).view("<u8").reshape(-1, 8)


def _unpack(words: np.ndarray, device: torch.device) -> Tensor:
    """The inverse: (B,8,8,8) bool."""
    packed = torch.from_numpy(words.astype("<u8").view(np.uint8).reshape(-1, 8, 8)).to(device)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    return (packed[..., None] >> bits & 1).bool()


class _Surface:
    """Marching cubes on blocks whose outside is known."""

    def __init__(self, owners, values, level, grid, rows, outside, empty):
        device = values.device
        self.values, self.level, self.grid, self.device = values, level, grid, device
        # two blocks more: one all outside, one all inside, for those that are not stored
        uniform = torch.tensor([True, False], device=device)[:, None, None, None].expand(2, 8, 8, 8)
        self.outside = torch.cat([outside, uniform])
        B = len(values)
        table = np.full((grid + 2,) * 3, B, np.int32)  # beyond the grid all is outside
        inner = np.where(rows < 0, np.where(empty, B, B + 1), rows).reshape((grid,) * 3)
        table[1:-1, 1:-1, 1:-1] = inner
        self.rows = torch.from_numpy(table).to(device)  # (G+2,G+2,G+2) row of each block, from -1 on
        self.owners = torch.from_numpy(owners).to(device)  # (W,)
        edges, counts = marching_cubes_table()
        self.edges, self.counts = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (edges, counts))

    def extract(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Vertices (V,3) float32, faces (F,3) int64 and gradients (V,3) float32, on the CPU."""
        W, side = len(self.owners), self.grid + 1
        ranks = torch.empty(W, 3 * 512, dtype=torch.int16, device=self.device)
        vertices, gradients, counts, cubes = [], [], [], []
        for first in range(0, W, CHUNK):
            some = slice(first, first + CHUNK)
            corner = self._corner(self.owners[some])
            inside = ~self._signs(corner)  # (w,9,9,9)
            at = inside[:, :-1, :-1, :-1]
            ahead = (inside[:, 1:, :-1, :-1], inside[:, :-1, 1:, :-1], inside[:, :-1, :-1, 1:])
            crossed = torch.stack([at ^ other for other in ahead], dim=1).flatten(1)  # (w, 3 · 512)
            rank = crossed.cumsum(1, dtype=torch.int16)
            counts.append(rank[:, -1].long())
            ranks[some] = rank - crossed.short()
            for where in crossed.nonzero().split(VERTEX_CHUNK):
                made = self._vertices(corner[where[:, 0]] * 8, where[:, 1])
                vertices.append(made[0])
                gradients.append(made[1])
            case = torch.zeros_like(at, dtype=torch.uint8)
            for k, (x, y, z) in enumerate(CORNERS.tolist()):
                case |= inside[:, x : x + 8, y : y + 8, z : z + 8].to(torch.uint8) << k
            where = (self.counts[case.long()] > 0).view(len(corner), -1).nonzero()  # (cubes, 2)
            owner, place = where.unbind(1)
            cubes.append((owner + first, place, case.view(len(corner), -1)[owner, place].long()))
        counts = torch.cat(counts)
        base = counts.cumsum(0) - counts
        owner_rows = torch.full((side**3,), -1, dtype=torch.long, device=self.device)
        owner_rows[self.owners] = torch.arange(W, device=self.device)
        faces = [self._faces(owner, place, case, base, ranks, owner_rows) for owner, place, case in cubes]
        faces, vertices = torch.cat(faces), torch.cat(vertices)
        if not len(faces):
            low, high = self.values.min().item(), self.values.max().item()
            raise ValueError(f"expected values on both sides of {self.level}, got {low:.3g} to {high:.3g}")
        return vertices.cpu().numpy(), faces.cpu().numpy(), torch.cat(gradients).cpu().numpy()

    def _corner(self, owners: Tensor) -> Tensor:
        """Block coordinates (w,3) of owners, from -1 on."""
        side = self.grid + 1
        return torch.stack([owners // side**2, owners // side % side, owners % side], dim=1) - 1

    def _signs(self, corner: Tensor) -> Tensor:
        """Outside or not, of the voxels of blocks (w,3) and of the next layer, (w,9,9,9) bool."""
        signs = torch.empty(len(corner), 9, 9, 9, dtype=torch.bool, device=self.device)
        for x, y, z in CORNERS.tolist():
            row = self.rows[tuple((corner + corner.new_tensor([x, y, z]) + 1).T)].long()
            target = tuple(slice(8, 9) if step else slice(0, 8) for step in (x, y, z))
            source = tuple(slice(0, 1) if step else slice(0, 8) for step in (x, y, z))
            signs[:, target[0], target[1], target[2]] = self.outside[:, source[0], source[1], source[2]][row]
        return signs

    def _value_at(self, voxel: Tensor) -> Tensor:
        """Value minus level at voxels (n,3), (n,) float64, of the sign that its bit says."""
        row = self.rows[tuple(((voxel >> 3) + 1).T)].long()
        place = tuple((voxel & 7).T)
        outside, stored = self.outside[(row, *place)], row < len(self.values)
        value = self.values[(row.clamp(max=len(self.values) - 1), *place)].double() - self.level
        kept = stored & ((value >= 0) == outside)
        return torch.where(kept, value, torch.where(outside, 1.0, -1.0).double())

    def _vertices(self, origin: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Vertices and gradients (n,3) float32 on edges (n,), 512 axis + place, of blocks beginning at origin (n,3)."""
        unit = torch.eye(3, dtype=torch.long, device=self.device)
        axis, place = edge // 512, edge % 512
        voxel = origin + torch.stack([place >> 6, place >> 3 & 7, place & 7], dim=1)
        step = unit[axis]
        here, there = self._value_at(voxel), self._value_at(voxel + step)
        t = (here / (here - there)).clamp(MARGIN, 1.0 - MARGIN)[:, None]
        vertices = ((voxel + t * step + 0.5) * (1.0 / (4.0 * self.grid)) - 1.0).clamp(-1.0, 1.0)
        gradient = torch.zeros_like(vertices)
        for share, end in ((1.0 - t, voxel), (t, voxel + step)):
            differences = [self._value_at(end + unit[i]) - self._value_at(end - unit[i]) for i in range(3)]
            gradient += share * torch.stack(differences, dim=1)
        return vertices.float(), gradient.float()

    def _faces(self, owner, place, case, base, ranks, owner_rows) -> Tensor:
        """Faces (f,3) of cubes: rows of their owners, place in them, and case."""
        number = self.counts[case]
        cube = torch.repeat_interleave(torch.arange(len(case), device=self.device), number)
        triangle = torch.arange(len(cube), device=self.device) - (number.cumsum(0) - number)[cube]
        edge = self.edges[case[cube], triangle]  # (f,3)
        first = torch.from_numpy(CORNERS[EDGES]).to(self.device)[edge]  # (f,3,3): where each edge begins
        x, y, z = (first + torch.stack([place >> 6, place >> 3 & 7, place & 7], dim=1)[cube, None]).unbind(2)
        side = self.grid + 1
        row = owner_rows[self.owners[owner][cube, None] + ((x >> 3) * side + (y >> 3)) * side + (z >> 3)]
        return base[row] + ranks[row, 512 * (edge // 4) + ((x & 7) << 6) + ((y & 7) << 3) + (z & 7)]

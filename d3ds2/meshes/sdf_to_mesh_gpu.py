"""`sdf_to_mesh` for values on a GPU: the same mesh, with the same faces bit for bit, made on the GPU.

One bit of each voxel goes to the CPU, where the flood fill works on blocks, and comes back. To close gaps, the values
of some faces of blocks go there too, and further blocks come back (`gap_fill`). Tensor operations then find the cubes,
vertices and faces of some blocks at a time. Vertices and faces are numbered as in `marching_cubes`: by owner block, by
axis or cube, and by place.

Sizes:
    R  voxels per edge     G = R / 8  blocks per edge     B  stored blocks     W  owners     V  vertices     F  faces
"""

import numpy as np
import torch
from torch import Tensor

from .block import BLOCK, BLOCK_BITS, BLOCK_LAST, BLOCK_VOXELS
from .fill import fill_from_outside
from .gap_fill import fill_gaps
from .marching_cubes import MARGIN
from .marching_cubes_table import CORNERS, EDGES, marching_cubes_table
from .mesh import Mesh
from .sdf_to_mesh import finish_mesh, owners_of, sdf_to_mesh

CHUNK = 8192  # owners at a time
VERTEX_CHUNK = 1 << 18  # vertices at a time
LAYER_BITS = 2 * BLOCK_BITS  # `place >> LAYER_BITS` is x of a place in a block


def tensors_to_mesh(block_coords: Tensor, values: Tensor, resolution: int, **options) -> Mesh:
    """`sdf_to_mesh` of tensors on any device: block_coords (B,3), values (B,8,8,8). Arguments and errors as there."""
    return sdf_to_mesh(block_coords.cpu().numpy(), values.cpu().numpy(), resolution, **options)


def device_mesh(
    block_coords: Tensor,
    values: Tensor,
    resolution: int,
    level: float = 0.0,
    min_component: float = 0.0,
    keep_largest: bool = False,
    close_gaps: bool = False,
) -> Mesh:
    """Extract the outer surface where `values` cross `level`, as `sdf_to_mesh` does.

    Args:
        block_coords: (B,3) integers in [0, R/8), each block once.
        values: (B,8,8,8) float32 and finite, on a device that has float64.
        resolution, level, min_component, keep_largest, close_gaps: see `sdf_to_mesh`.

    Raises:
        ValueError: a block is given twice, there is no surface at this level, or min_component is too large.
    """
    grid, coords = resolution // BLOCK, block_coords.cpu().numpy().astype(np.int64)
    positive = _pack(values >= level)
    if close_gaps:

        def face_values(axis: int, layer: int, rows: np.ndarray) -> np.ndarray:
            faces = values.select(axis + 1, layer)[torch.from_numpy(rows).to(values.device, torch.long)]
            return (faces - level).cpu().numpy()

        def face_sums(axis: int, layer: int) -> np.ndarray:
            return (values.select(axis + 1, layer) - level).sum((1, 2)).cpu().numpy()

        gaps = fill_gaps(coords, positive, face_sums, face_values, grid)
        rows, words, empty = gaps.rows, gaps.outside, gaps.empty
        if len(gaps.coords):
            coords = np.concatenate([coords, gaps.coords])
            values = torch.cat([values, torch.from_numpy(gaps.values + np.float32(level)).to(values.device)])
    else:
        rows, words, empty = fill_from_outside(coords, positive, grid)
    surface = _Surface(owners_of(coords, grid), values, level, grid, rows, _unpack(words, values.device), empty)
    return finish_mesh(*surface.extract(), min_component, keep_largest)


def _pack(mask: Tensor) -> np.ndarray:
    """Pack (B,8,8,8) bool into the words of a fill, (B,8) uint64 on the CPU."""
    bits = torch.tensor([1 << z for z in range(BLOCK)], dtype=torch.uint8, device=mask.device)
    packed = (mask * bits).sum(-1, dtype=torch.uint8).cpu().numpy()  # (B,8,8): bit z of byte y of word x
    return np.ascontiguousarray(packed).view("<u8").reshape(-1, BLOCK)


def _unpack(words: np.ndarray, device: torch.device) -> Tensor:
    """Unpack the words of a fill (B,8) into (B,8,8,8) bool: the inverse of `_pack`."""
    packed = torch.from_numpy(words.astype("<u8").view(np.uint8).reshape(-1, BLOCK, BLOCK)).to(device)
    bits = torch.arange(BLOCK, dtype=torch.uint8, device=device)
    return (packed[..., None] >> bits & 1).bool()


def _place_coords(place: Tensor) -> Tensor:
    """Return x, y and z (n,3) of places (n,) in a block."""
    return torch.stack([place >> LAYER_BITS, place >> BLOCK_BITS & BLOCK_LAST, place & BLOCK_LAST], dim=1)


class _Surface:
    """Marching cubes on blocks whose outside is known."""

    def __init__(self, owners, values, level, grid, rows, outside, empty):
        device = values.device
        self.values, self.level, self.grid, self.device = values, level, grid, device
        # two more blocks stand for those that are not stored: one all outside, one all inside
        uniform = torch.tensor([True, False], device=device)[:, None, None, None].expand(2, BLOCK, BLOCK, BLOCK)
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
        """Return vertices (V,3) float32, faces (F,3) int64 and gradients (V,3) float32, on the CPU."""
        W, side = len(self.owners), self.grid + 1
        ranks = torch.empty(W, 3 * BLOCK_VOXELS, dtype=torch.int16, device=self.device)
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
                made = self._vertices(corner[where[:, 0]] * BLOCK, where[:, 1])
                vertices.append(made[0])
                gradients.append(made[1])
            case = torch.zeros_like(at, dtype=torch.uint8)
            for k, (x, y, z) in enumerate(CORNERS.tolist()):
                case |= inside[:, x : x + BLOCK, y : y + BLOCK, z : z + BLOCK].to(torch.uint8) << k
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
        """Return the block coordinates (w,3) of owners (w,), which begin at -1."""
        side = self.grid + 1
        return torch.stack([owners // side**2, owners // side % side, owners % side], dim=1) - 1

    def _signs(self, corner: Tensor) -> Tensor:
        """Return which voxels of blocks (w,3), and of the layers next to them, are outside: (w,9,9,9) bool."""
        signs = torch.empty(len(corner), *(BLOCK + 1,) * 3, dtype=torch.bool, device=self.device)
        for x, y, z in CORNERS.tolist():
            row = self.rows[tuple((corner + corner.new_tensor([x, y, z]) + 1).T)].long()
            target = tuple(slice(BLOCK, BLOCK + 1) if step else slice(0, BLOCK) for step in (x, y, z))
            source = tuple(slice(0, 1) if step else slice(0, BLOCK) for step in (x, y, z))
            signs[:, target[0], target[1], target[2]] = self.outside[:, source[0], source[1], source[2]][row]
        return signs

    def _value_at(self, voxel: Tensor) -> Tensor:
        """Return value minus level at voxels (n,3), (n,) float64; ±1 where its sign contradicts the voxel's bit."""
        row = self.rows[tuple(((voxel >> BLOCK_BITS) + 1).T)].long()
        place = tuple((voxel & BLOCK_LAST).T)
        outside, stored = self.outside[(row, *place)], row < len(self.values)
        value = self.values[(row.clamp(max=len(self.values) - 1), *place)].double() - self.level
        kept = stored & ((value >= 0) == outside)
        return torch.where(kept, value, torch.where(outside, 1.0, -1.0).double())

    def _vertices(self, origin: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Return vertices and gradients, (n,3) float32, on edges (n,) = 512 axis + place of blocks at origin (n,3)."""
        unit = torch.eye(3, dtype=torch.long, device=self.device)
        axis, place = edge // BLOCK_VOXELS, edge % BLOCK_VOXELS
        voxel = origin + _place_coords(place)
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
        """Return the faces (f,3) of cubes, each given by the row of its owner, its place in the block, and its case."""
        number = self.counts[case]
        cube = torch.repeat_interleave(torch.arange(len(case), device=self.device), number)
        triangle = torch.arange(len(cube), device=self.device) - (number.cumsum(0) - number)[cube]
        edge = self.edges[case[cube], triangle]  # (f,3)
        first = torch.from_numpy(CORNERS[EDGES]).to(self.device)[edge]  # (f,3,3): where each edge begins
        x, y, z = (first + _place_coords(place)[cube, None]).unbind(2)
        side = self.grid + 1
        step = ((x >> BLOCK_BITS) * side + (y >> BLOCK_BITS)) * side + (z >> BLOCK_BITS)
        row = owner_rows[self.owners[owner][cube, None] + step]
        place = ((x & BLOCK_LAST) << LAYER_BITS) + ((y & BLOCK_LAST) << BLOCK_BITS) + (z & BLOCK_LAST)
        return base[row] + ranks[row, BLOCK_VOXELS * (edge // 4) + place]

"""The point encoders of ULIP-2, Uni3D and OpenShape: a coloured point cloud -> a vector beside those of pictures.

All three sample centres, gather points around each, make one token of each group by a small PointNet, and read the
tokens with a transformer. The names of tensors are those of the public code of each: salesforce/ULIP
(`ULIP2_PointBERT_Colored`), baaivision/Uni3D (`create_uni3d`) and Colin97/OpenShape_code (PointBERT, `scaling: 4`; its
SparseConv form, which needs MinkowskiEngine, is not read). They follow from that code; the published checkpoints
themselves have not been tried.

Sizes: B clouds, N points, G groups of k points, C channels of a token, D of the result.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.evaluation.tensor_files import load_tensors, read_tensors, under

POINTS = 10_000  # that the encoders were trained with
GREY = 0.4  # the colour of clouds without colours in all three
UNI3D_TOWERS = {  # by the width C: names of timm
    192: "eva02_tiny_patch14_224",
    384: "eva02_small_patch14_224",
    768: "eva02_base_patch14_448",
    1024: "eva02_large_patch14_448",
    1408: "eva_giant_patch14_560",
}


def prepare_points(points: Tensor, z_up: bool = False) -> Tensor:
    """Centre clouds (B, N, 3) with Y up at their mean, scale them into the unit ball, and add grey: (B, N, 6).

    With `z_up`, Y and Z are swapped as OpenShape does.
    """
    points = points[..., [0, 2, 1]] if z_up else points
    points = points - points.mean(1, keepdim=True)
    points = points / points.norm(dim=-1).amax(1)[:, None, None].clamp(min=1e-6)
    return torch.cat([points, torch.full_like(points, GREY)], dim=-1)


# --- groups of points


def farthest_points(points: Tensor, number: int) -> Tensor:
    """Choose points of (B, N, 3), each the farthest from those before it, from the first on: (B, number) int64."""
    distance = torch.full(points.shape[:2], torch.inf, device=points.device)
    chosen = torch.zeros(len(points), number, dtype=torch.int64, device=points.device)
    for i in range(1, number):
        last = take(points, chosen[:, i - 1 : i])  # (B, 1, 3)
        distance = torch.minimum(distance, (points - last).square().sum(-1))
        chosen[:, i] = distance.argmax(1)
    return chosen


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows (B, N, C) by index (B, ...): (B, ..., C)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, rows.shape[-1])
    return rows.gather(1, flat).unflatten(1, index.shape[1:])


def nearest_groups(points: Tensor, centres: Tensor, size: int) -> Tensor:
    """Find the nearest points (B, N, 3) of each centre (B, G, 3): (B, G, size) int64."""
    return torch.cdist(centres, points).topk(size, largest=False).indices


def ball_groups(points: Tensor, centres: Tensor, size: int, radius: float) -> Tensor:
    """Find the first points within a radius of each centre, the first one again where there are fewer.

    Takes (B, N, 3) and (B, G, 3); returns (B, G, size) int64.
    """
    N = points.shape[1]
    order = torch.arange(N, device=points.device)
    found = torch.where(torch.cdist(centres, points) <= radius, order, N)  # (B, G, N)
    first = found.topk(size, largest=False, sorted=True).values
    return torch.where(first == N, first[..., :1], first)


class GroupEncoder(nn.Module):
    """A PointNet of two stages, as in Point-BERT: groups (B, G, k, 6) -> tokens (B, G, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first_conv = self._stage(6, 128, 256)
        self.second_conv = self._stage(512, 512, channels)

    @staticmethod
    def _stage(channels: int, hidden: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(channels, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, out, 1)
        )

    def forward(self, groups: Tensor) -> Tensor:
        x = self.first_conv(groups.flatten(0, 1).transpose(1, 2))  # (B G, 256, k)
        whole = x.amax(2, keepdim=True).expand_as(x)
        return self.second_conv(torch.cat([whole, x], 1)).amax(2).unflatten(0, groups.shape[:2])


class TokenEncoder(nn.Module):
    """The part that ULIP-2 and Uni3D share: tokens of groups of nearest points, their places, and one for the whole."""

    num_groups = 512

    def __init__(self, width: int, encoder_width: int, group_size: int, bridge: str):
        super().__init__()
        self.group_size, self.bridge = group_size, bridge
        self.encoder = GroupEncoder(encoder_width)
        self.add_module(bridge, nn.Linear(encoder_width, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))

    def tokens(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of a cloud (B, N, 6) and their places, each (B, 1 + G, C)."""
        points = cloud[..., :3]
        centres = take(points, farthest_points(points, self.num_groups))
        groups = take(cloud, nearest_groups(points, centres, self.group_size))  # (B, G, k, 6)
        groups = torch.cat([groups[..., :3] - centres[:, :, None], groups[..., 3:]], -1)
        tokens = getattr(self, self.bridge)(self.encoder(groups))
        whole, place = (part.expand(len(cloud), -1, -1) for part in (self.cls_token, self.cls_pos))
        return torch.cat([whole, tokens], 1), torch.cat([place, self.pos_embed(centres)], 1)


class Block(nn.Module):
    """Attention and MLP, each after a norm: (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](attend(self.attn["qkv"](self.norm1(x)), self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Full attention of queries, keys and values side by side, (B, T, 3 H D) -> (B, T, H D)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# --- the three encoders


class ULIP2(TokenEncoder):
    """Point-BERT for colours of ULIP-2: 18 blocks of width 384, groups of 32 points."""

    def __init__(self, width: int = 384, depth: int = 18, heads: int = 6, out: int = 1280):
        super().__init__(width, 256, 32, "reduce_dim")
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(Block(width, heads) for _ in range(depth))})
        self.norm = nn.LayerNorm(width)
        self.pc_projection = nn.Parameter(torch.zeros(2 * width, out))

    def forward(self, cloud: Tensor) -> Tensor:
        """(B, N, 6) -> (B, D)."""
        x, places = self.tokens(cloud)
        for block in self.blocks["blocks"]:
            x = block(x + places)
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].amax(1)], -1) @ self.pc_projection


class Uni3D(TokenEncoder):
    """The blocks of an EVA of timm on groups of 64 points.

    Raises:
        ImportError: timm is not installed.
    """

    def __init__(self, tower: str, encoder_width: int = 512, out: int = 1024):
        visual = make_eva(tower)
        width = visual.embed_dim
        super().__init__(width, encoder_width, 64, "encoder2trans")
        self.visual = nn.ModuleDict({"blocks": visual.blocks, "norm": visual.norm, "fc_norm": visual.fc_norm})
        self.trans2embed = nn.Linear(width, out)

    def forward(self, cloud: Tensor) -> Tensor:
        """(B, N, 6) -> (B, D)."""
        x, places = self.tokens(cloud)
        x = x + places
        for block in self.visual["blocks"]:
            x = block(x)  # without the rotation of pixels' places
        return self.trans2embed(self.visual["fc_norm"](self.visual["norm"](x[:, 0])))


def make_eva(name: str, classes: int = 0, pool: str = "avg") -> nn.Module:
    """Make an EVA of timm without weights.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"EVA transformers need timm (pip install timm): {error}") from None
    return timm.create_model(name, num_classes=classes, global_pool=pool)


class PreNorm(nn.Module):
    """A layer `fn` after a norm, under the names of OpenShape."""

    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fn(self.norm(x))


class OpenShapeAttention(nn.Module):
    """Full attention with heads of 64 channels."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * 64 * heads, bias=False)
        self.to_out = nn.Sequential(nn.Linear(64 * heads, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.to_out(attend(self.to_qkv(x), self.heads))


class OpenShapeMLP(nn.Module):
    """Linear, GELU, Linear; the places of its dropouts count."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.net(x)


class OpenShape(nn.Module):
    """Point-BERT of OpenShape for ViT-bigG-14: 12 blocks of width 512, 384 groups of 64 points within 0.2."""

    num_groups, group_size, radius = 384, 64, 0.2

    def __init__(self, width: int = 512, depth: int = 12, heads: int = 8, out: int = 1280):
        super().__init__()
        group = nn.ModuleDict({"mlp_convs": nn.ModuleList(), "mlp_bns": nn.ModuleList()})
        for channels, hidden in ((9, 64), (64, 64), (64, 256)):
            group["mlp_convs"].append(nn.Conv2d(channels, hidden, 1))
            group["mlp_bns"].append(nn.BatchNorm2d(hidden))
        layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(width, OpenShapeAttention(width, heads)),
                    PreNorm(width, OpenShapeMLP(width, 3 * width)),
                ]
            )
            for _ in range(depth)
        )
        self.ppat = nn.ModuleDict(
            {
                "sa": group,
                "lift": nn.Sequential(nn.Conv1d(256 + 3, width, 1), nn.Identity(), nn.LayerNorm([width])),
                "transformer": nn.ModuleDict({"layers": layers}),
            }
        )
        self.ppat.register_parameter("cls_token", nn.Parameter(torch.zeros(width)))
        self.proj = nn.Linear(width, out)

    def forward(self, cloud: Tensor) -> Tensor:
        """(B, N, 6) -> (B, D)."""
        points = cloud[..., :3]
        centres = take(points, farthest_points(points, self.num_groups))
        groups = take(cloud, ball_groups(points, centres, self.group_size, self.radius))  # (B, G, k, 6)
        x = torch.cat([groups[..., :3] - centres[:, :, None], groups], -1).permute(0, 3, 2, 1)  # (B, 9, k, G)
        for conv, norm in zip(self.ppat["sa"]["mlp_convs"], self.ppat["sa"]["mlp_bns"], strict=True):
            x = F.relu(norm(conv(x)))
        x = torch.cat([centres.transpose(1, 2), x.amax(2)], 1)  # (B, 3 + 256, G)
        conv, _, norm = self.ppat["lift"]
        x = norm(conv(x).transpose(1, 2))
        x = torch.cat([self.ppat.cls_token.expand(len(x), 1, -1), x], 1)
        for attention, mlp in self.ppat["transformer"]["layers"]:
            x = attention(x) + x
            x = mlp(x) + x
        return self.proj(x[:, 0])


# --- checkpoints


def load_ulip2(file: str | Path) -> ULIP2:
    """Load a checkpoint of `ULIP2_PointBERT_Colored`; the tensors of its image and text towers are left out.

    Raises:
        ValueError: the file is damaged or of another network.
        OSError: it cannot be read.
    """
    tensors = without_module(_part(read_tensors(file), "state_dict"))
    own = under(tensors, "point_encoder.") | {k: v for k, v in tensors.items() if k == "pc_projection"}
    try:
        width, depth = own["norm.weight"].shape[0], _count(own, "blocks.blocks.")
        network = ULIP2(width, depth, width // 64, own["pc_projection"].shape[1])
    except (KeyError, AttributeError, IndexError):
        raise ValueError(f"expected the point encoder of ULIP-2 in {file}") from None
    load_tensors(network, own, file, "the point encoder of ULIP-2")
    return network.eval()


def load_uni3d(file: str | Path) -> Uni3D:
    """Load a checkpoint of Uni3D of any of its five sizes.

    Raises:
        ValueError: the file is damaged or of another network.
        OSError: it cannot be read.
        ImportError: timm is not installed.
    """
    own = under(without_module(_part(read_tensors(file), "module")), "point_encoder.")
    try:
        width, encoder_width = own["encoder2trans.weight"].shape
        tower, out = UNI3D_TOWERS[width], own["trans2embed.weight"].shape[0]
    except (KeyError, AttributeError, ValueError):
        raise ValueError(f"expected the point encoder of Uni3D in {file}") from None
    network = Uni3D(tower, encoder_width, out)
    used = ("visual.blocks.", "visual.norm.", "visual.fc_norm.")  # not what EVA has for pixels
    tensors = {k: v for k, v in own.items() if k.startswith(used) or not k.startswith("visual.")}
    load_tensors(network, tensors, file, "the point encoder of Uni3D")
    return network.eval()


def load_openshape(file: str | Path) -> OpenShape:
    """Load a PointBERT checkpoint of OpenShape for ViT-bigG-14.

    Raises:
        ValueError: the file is damaged or of another network.
        OSError: it cannot be read.
    """
    own = without_module(_part(read_tensors(file), "state_dict"))
    try:
        width, depth = own["ppat.cls_token"].shape[0], _count(own, "ppat.transformer.layers.")
        heads = own["ppat.transformer.layers.0.0.fn.to_qkv.weight"].shape[0] // (3 * 64)
        network = OpenShape(width, depth, heads, own["proj.weight"].shape[0])
    except (KeyError, AttributeError, IndexError):
        raise ValueError(f"expected the PointBERT of OpenShape in {file}") from None
    load_tensors(network, own, file, "the PointBERT of OpenShape")
    return network.eval()


def without_module(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off "module.", which data parallel training puts before each name."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _part(found: dict, key: str) -> dict:
    part = found.get(key, found)
    return part if isinstance(part, dict) else {}


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name.split(".")[0]) for name in under(tensors, prefix)), default=-1)

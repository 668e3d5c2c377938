"""Round trips through the SDF VAE, mesh -> SDF -> latents -> SDF -> mesh, scored on a split."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from d3ds2.geometry.voxels import BLOCK, Voxels
from d3ds2.networks.sdf_vae import SDFVAE
from training.data.loading import to_device
from training.data.meshes import MeshEntry
from training.data.shape_batches import ShapeBatch, active_voxels, pack_shapes
from training.data.shape_files import load_shape, shape_path
from training.evaluation.learned_scores import LearnedScores
from training.evaluation.score_tables import Column, format_summary, markdown_table, summarize
from training.evaluation.shape_scores import ScoreConfig, score_round_trip

COLUMNS = {
    "precision": Column("precision_voxel", digits=4),
    "recall": Column("recall_voxel", digits=4),
    "F1 @ 1 voxel": Column("f1_voxel", digits=4),
    "F1 @ 0.005, %": Column("f1_0.005", 100, 2),
    "F1 @ 0.001, %": Column("f1_0.001", 100, 2),
    "CD ×10³": Column("chamfer", 1e3, 2),
    "volume IoU": Column("iou", digits=4),
    "to original ×10³": Column("original_distance", 1e3, 2),
    "target to original ×10³": Column("original_distance_of_target", 1e3, 2),
}
COUNTS = ("watertight", "outer_shells", "true_outer_shells", "inner_shells", "true_inner_shells", "tokens")


@torch.no_grad()
def decode_again(vae: SDFVAE, batch: ShapeBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encode shapes (posterior mean) and decode them: block_coords (M,3) and SDF values (M,8,8,8) fp16 of each."""
    mean, _, latent_voxels = vae.encode(*active_voxels(batch))
    return split_blocks(*vae.decode(mean, latent_voxels))


def split_blocks(sdf: Tensor, voxels: Voxels) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split the result (512 M, 1) of `SDFVAE.decode` by sample: block_coords (M,3) int32 and values (M,8,8,8) fp16."""
    values = sdf.view(-1, BLOCK, BLOCK, BLOCK).half().cpu().split(voxels.block_counts)
    coords = voxels.block_coords[:, 1:].cpu().split(voxels.block_counts)
    return [(c.numpy(), v.numpy()) for c, v in zip(coords, values, strict=True)]


def batches_of(names: list[str], tokens: np.ndarray, max_tokens: int) -> Iterator[list[str]]:
    """Yield n names in order, in batches of at most `max_tokens`; a larger shape is a batch of its own.

    `tokens` (n,) are the sizes of the shapes.
    """
    batch, size = [], 0
    for name, count in zip(names, tokens.tolist(), strict=True):
        if batch and size + count > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += count
    if batch:
        yield batch


def round_trips(
    vae: SDFVAE,
    batches: Iterable[list[str]],
    entries: dict[str, MeshEntry],
    pool: Executor,
    config: ScoreConfig,
    learned: LearnedScores,
) -> list[dict]:
    """Score every shape: records with its name. The pool meshes and compares while the next batch is decoded.

    What networks look at is given to `learned`, for Normal-FID.
    """
    device = next(vae.parameters()).device
    jobs = {}
    for names in batches:
        shapes = [load_shape(shape_path(config.data_dir, config.resolution, name)) for name in names]
        decoded = decode_again(vae, to_device(pack_shapes(shapes, config.resolution), device))
        for name, (coords, values) in zip(names, decoded, strict=True):
            look = "inception" in learned.networks
            jobs[name] = pool.submit(score_round_trip, name, coords, values, entries.get(name), config, look)
    records = []
    for name in tqdm(list(jobs), desc="round trip", unit="mesh"):
        scores, appearances = jobs.pop(name).result()
        learned.add(None, appearances)
        records.append({"name": name} | scores)
    return records


def groups_of(scores: list[dict], sources: dict[str, str], entries: dict[str, MeshEntry]) -> dict[str, list[dict]]:
    """Group scores by source and, if the corpus index names them, by defects of the mesh; then all of them."""
    groups = {}
    for source in sorted(set(sources.values())):
        groups[source] = [s for s in scores if sources[s["name"]] == source]
    defects = {
        "open edges": lambda e: e.boundary_edges,
        "non-manifold edges": lambda e: e.nonmanifold_edges,
        "several parts (may pass through each other)": lambda e: (e.components or 0) > 1,
        "any of these": lambda e: e.boundary_edges or e.nonmanifold_edges or (e.components or 0) > 1,
    }
    known = {s["name"]: entries[s["name"]] for s in scores if s["name"] in entries}
    for label, has in defects.items():
        if group := [s for s in scores if s["name"] in known and has(known[s["name"]])]:
            groups[label] = group
    return groups | {"all": scores}


def report(groups: dict[str, list[dict]], resolution: int) -> tuple[dict, str]:
    """Return the summaries for evaluation.json, and the table."""
    summaries, rows = {}, []
    for label, group in groups.items():
        kept = {c.score: summarize([s[c.score] for s in group if c.score in s]) for c in COLUMNS.values()}
        counts = {name: summarize([s[name] for s in group])["mean"] for name in COUNTS}
        exact = np.mean([s["outer_shells"] == s["true_outer_shells"] for s in group])
        summaries[label] = kept | counts | {"same_outer_shells": float(exact), "count": len(group)}
        cells = [format_summary(kept[c.score], c.scale, c.digits) for c in COLUMNS.values()]
        shells = f"{counts['outer_shells']:.2f} / {counts['true_outer_shells']:.2f}"
        rows.append(
            [
                f"{label} ({len(group)})",
                *cells,
                f"{100 * counts['watertight']:.0f} %",
                shells,
                f"{counts['inner_shells']:.2f}",
            ]
        )
    header = ["meshes", *COLUMNS, "watertight", "outer shells / true", "inner shells"]
    note = (
        f"Mesh → SDF at {resolution}³ → latents → SDF → mesh, against the mesh of the encoded SDF (the watertight "
        "outer surface). Means with 95 % bootstrap intervals over meshes. Distances are in units of the cube [-1,1]³; "
        f"one voxel is {2 / resolution:.5f}. CD is the mean of both directions.\n\n"
    )
    return summaries, "## SDF VAE round trip\n\n" + note + markdown_table(header, rows)

"""Published collections of meshes, in the folders that their own tools download them to.

    objaverse      Objaverse 1.0: glbs/000-023/<uid>.glb, metadata/000-023.json.gz, lvis-annotations.json.gz
    objaverse-xl   Objaverse-XL, with github/github.parquet and so on:
                   hf-objaverse-v1/  as above
                   github/repos/<organisation>/<repository>/...  (downloaded with save_repo_format="files")
                   smithsonian/objects/<uuid>.glb    thingiverse/thing-<thing>-file-<file>.stl
    shapenet       ShapeNetCore: <synset>/<id>/models/model_normalized.obj (v2) or <synset>/<id>/model.obj (v1),
                   taxonomy.json, all.csv (v2)

Only meshes that are on the disk are listed. `about` holds what the collection says of a mesh: title, licence, author,
url and category. It takes minutes to read for a whole collection, so it is read only if it is wanted.
"""

import csv
import gzip
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

from training.data.mesh_entry import SPLITS, SUFFIXES, MeshEntry, split_of

OBJAVERSE, OBJAVERSE_XL, SHAPENET = "objaverse", "objaverse-xl", "shapenet"
SKETCHFAB = "hf-objaverse-v1"  # the folder of Objaverse 1.0 within Objaverse-XL
XL_PARTS = ("github", "smithsonian", "thingiverse", "sketchfab")
SYNSET = "[0-9]" * 8


def collection_of(folder: Path) -> str | None:
    """Return which collection lies in a folder, by its files; None if it is another folder."""
    if (folder / "object-paths.json.gz").is_file() or any(folder.glob("glbs/[0-9]*-[0-9]*")):
        return OBJAVERSE
    if (folder / SKETCHFAB).is_dir() or any((folder / part / f"{part}.parquet").is_file() for part in XL_PARTS):
        return OBJAVERSE_XL
    if (folder / "taxonomy.json").is_file():
        return SHAPENET
    return None


# --- Objaverse 1.0


def list_objaverse(folder: Path, about: bool = False) -> list[MeshEntry]:
    """List the meshes of Objaverse 1.0; their names are the uids.

    Raises:
        ValueError: a file of metadata is damaged.
    """
    categories = _lvis(folder / "lvis-annotations.json.gz") if about else {}
    entries = []
    for part in sorted((folder / "glbs").glob("*")):
        known = _read_json(folder / "metadata" / f"{part.name}.json.gz") if about else {}
        for path in sorted(part.glob("*.glb")):
            uid = path.stem
            described = _objaverse_about(known.get(uid) or {}, categories.get(uid, ""))
            entries.append(MeshEntry(uid, path, split_of(uid), OBJAVERSE, about=described))
    return entries


def _objaverse_about(record: dict, lvis: str) -> dict[str, str]:
    user, categories = record.get("user") or {}, record.get("categories") or []
    return _known(
        title=record.get("name"),
        licence=record.get("license"),
        author=user.get("displayName") or user.get("username"),
        url=record.get("viewerUrl"),
        category=lvis or ", ".join(category["name"] for category in categories if category.get("name")),
    )


def _lvis(file: Path) -> dict[str, str]:
    """Read the category of each uid that has one."""
    return {uid: category for category, uids in _read_json(file).items() for uid in uids}


# --- Objaverse-XL


def list_objaverse_xl(folder: Path, about: bool = False) -> list[MeshEntry]:
    """List the meshes of Objaverse-XL: those of GitHub by their sha256, each content once, others by their ids.

    Raises:
        ValueError: a file of annotations is damaged, or pyarrow, which reads them, is not installed.
    """
    entries = list_objaverse(folder / SKETCHFAB, about) if (folder / SKETCHFAB).is_dir() else []
    entries += _list_github(folder / "github", about)
    for part, files in (("smithsonian", "objects/*.glb"), ("thingiverse", "thing-*-file-*.stl")):
        licences = {}
        if about:
            for row in _annotations(folder / part / f"{part}.parquet", "fileIdentifier", "license"):
                licences[_id_of(part, row["fileIdentifier"])] = row
        for path in sorted((folder / part).glob(files)):
            row = licences.get(path.stem, {})
            described = _known(licence=row.get("license"), url=row.get("fileIdentifier"))
            entries.append(MeshEntry(path.stem, path, split_of(path.stem), part, about=described))
    return entries


def _id_of(part: str, identifier: str) -> str:
    """Return the name, without suffix, of the file that Objaverse-XL's tool makes for an identifier."""
    if part == "smithsonian":
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, identifier))
    thing = identifier.partition("thing:")[2].partition("/")[0]  # https://www.thingiverse.com/thing:1/files?fileId=2
    return f"thing-{thing}-file-{identifier.rpartition('fileId=')[2]}"


def _list_github(folder: Path, about: bool) -> list[MeshEntry]:
    repositories = {path.relative_to(folder / "repos").as_posix() for path in folder.glob("repos/*/*") if path.is_dir()}
    if not repositories:
        return []
    entries = {}
    for row in _annotations(folder / "github.parquet", "fileIdentifier", "sha256", "license"):
        parts = row["fileIdentifier"].split("/")  # https://github.com/organisation/repository/blob/commit/...
        repository = "/".join(parts[3:5])
        path = folder / "repos" / "/".join([repository, *parts[7:]])
        if repository not in repositories or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        name = row["sha256"]
        described = _known(licence=row["license"], author=parts[3], url=row["fileIdentifier"]) if about else {}
        entries.setdefault(name, MeshEntry(name, path, split_of(name), "github", about=described))
    return list(entries.values())


def _annotations(file: Path, *columns: str) -> Iterator[dict]:
    if not file.is_file():
        return
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"reading {file} needs pyarrow, which is not installed: pip install -e .[parquet]") from error
    try:
        for batch in parquet.ParquetFile(file).iter_batches(columns=list(columns)):
            yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(f"damaged file {file} ({error})") from error


# --- ShapeNet


def list_shapenet(folder: Path, about: bool = False) -> list[MeshEntry]:
    """List the meshes of ShapeNetCore as <synset>_<id>, in the splits of all.csv where there is one.

    The fronts of v2 look toward -Z. Those of v1 are not turned, as its files are in part mirrored.

    Raises:
        ValueError: taxonomy.json is damaged.
    """
    names = {}
    if about:
        names = {record["synsetId"]: record["name"] for record in _read_json(folder / "taxonomy.json") or []}
    splits, entries = _shapenet_splits(folder / "all.csv"), []
    for place in ("models/model_normalized.obj", "model.obj"):
        for path in sorted(folder.glob(f"{SYNSET}/*/{place}")):
            synset, model = path.relative_to(folder).parts[:2]
            described = _known(category=names.get(synset, "").split(",")[0])
            name = f"{synset}_{model}"
            split = splits.get((synset, model)) or split_of(name)
            turned = place != "model.obj"
            entries.append(MeshEntry(name, path, split, SHAPENET, turned=turned, about=described))
    return entries


def _shapenet_splits(file: Path) -> dict[tuple[str, str], str]:
    if not file.is_file():
        return {}
    with open(file, newline="") as rows:
        return {
            (row["synsetId"], row["modelId"]): row["split"] for row in csv.DictReader(rows) if row["split"] in SPLITS
        }


# --- files


def _read_json(file: Path):
    """Read a JSON file, compressed or not; {} if it is missing."""
    try:
        content = file.read_bytes()
        return json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    except FileNotFoundError:
        return {}
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"damaged file {file} ({error})") from error


def _known(**texts: str | None) -> dict[str, str]:
    return {key: text for key, text in texts.items() if text}

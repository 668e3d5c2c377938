"""The data of training: start-up over half a million shapes, compressed files, packs, and the wait of a step for data.

    python benchmarks/data.py ../shared/data/meshes WORK

Prepares 2,000 of the meshes at 64³, and 240 at 256³ with pictures of some of them, in the folder WORK (half an hour on
two cores; a second run keeps them), and makes an index of 500,000 shapes there, with the tables of a pack. Each start
is measured in a process of its own. Prints tables, and writes benchmarks/results/data-cpu.md.
"""

import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.data_corpus import COUNT, make_half_a_million, make_latents, prepare  # noqa: E402
from tests.support.range_server import serve  # noqa: E402
from training.data.array_files import read_arrays, write_arrays  # noqa: E402
from training.data.datasets import Shapes, Structures, StructureViews  # noqa: E402
from training.data.latent_views import LatentViews  # noqa: E402
from training.data.loading import load_batches  # noqa: E402
from training.data.shape_files import list_shapes, load_shape, shape_path  # noqa: E402
from training.data.views import Views  # noqa: E402
from training.pack import PackConfig  # noqa: E402
from training.pack import main as pack  # noqa: E402

CPU = torch.device("cpu")
WORKERS = 2
BATCHES = 12  # after the first ones, which the workers have read ahead
TRIES = 3
ARRAYS = ("block_coords", "sdf", "sharp")
ALL = tuple(range(8))


def main() -> None:
    if sys.argv[1] == "start":
        print(json.dumps(measure_start(*sys.argv[2:])))
        return
    meshes, work = sys.argv[1], Path(sys.argv[2])
    prepare(meshes, work)
    half = make_half_a_million(work / "half")
    text = f"{header()}\n"
    for measure, folder in ((start_table, half), (camera_table, work), (file_table, work), (wait_table, work)):
        lines = measure(folder)
        text += "\n" + "\n".join(lines) + "\n"
        print(*lines, sep="\n", flush=True)
        (ROOT / "benchmarks" / "results" / "data-cpu.md").write_text(text)  # also if it is stopped before the end


def header() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return (
        "# The data of training\n\n"
        f"{datetime.date.today()}, {model}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}, torch "
        f"{torch.__version__}, numpy {np.__version__}, commit {commit.strip()}. `python benchmarks/data.py`. Files are "
        "in the page cache."
    )


# --- start-up


def make_dataset(kind: str, data_dir: str):
    """Make a dataset as its trainer does, with the paper's batches."""
    if kind == "shapes":
        return Shapes(data_dir, "train", (256, 384, 512), 16, 10**6, 0, ALL)
    names, tokens = list_shapes(data_dir, "train", 512)
    if kind == "structures":
        return Structures(data_dir, names, 512, 16, 0, ALL, tokens)
    views = Views(data_dir, names, 518)
    if kind == "structure views":
        return StructureViews(views, 64, 1, 0, Structures(data_dir, views.names, 512, 1, 0), with_grids=True)
    return LatentViews(data_dir, 512, views, tokens, 8, 1, 200_000, 0)


def memory() -> tuple[float, float]:
    """Resident memory now and at most, in MiB."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_start(kind: str, data_dir: str) -> dict[str, float]:
    """Make a dataset and the plan of its first epoch."""
    before, _ = memory()
    processor, clock = time.process_time(), time.perf_counter()
    dataset = make_dataset(kind, data_dir)
    dataset.sizes(0)
    measured = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
    now, most = memory()
    return measured | {"mib": now - before, "most": most - before, "imports": before}


def start(kind: str, data_dir: str) -> dict[str, float]:
    """Measure a start in a process of its own."""
    command = [sys.executable, __file__, "start", kind, data_dir]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def start_table(half: Path) -> list[str]:
    lines = [
        f"## Start-up over {COUNT:,} shapes",
        "",
        "An index of records as prepare_shapes writes them (four resolutions, checksums; 164 MB), 24 pictures and 8 "
        "latents of each shape in the table of a pack. From the first line of the dataset to the plan of its first "
        "epoch; memory beyond the imports.",
        "",
        "| dataset | processor s | clock s | memory, MiB | at most, MiB |",
        "|---|---|---|---|---|",
    ]
    for kind, about in (
        ("shapes", "SDFs at 256³, 384³ and 512³, 8 symmetries"),
        ("structures", "structures at 512³, 8 symmetries"),
        ("structure views", "pictures and structures"),
        ("latent views", "pictures and latents at 512³"),
    ):
        found = start(kind, str(half))
        cells = f"{found['processor']:.1f} | {found['seconds']:.1f} | {found['mib']:.0f} | {found['most']:.0f}"
        lines.append(f"| {about} | {cells} |")
    return lines


def camera_table(work: Path) -> list[str]:
    """Start with the loose cameras.json of many shapes: the first start reads them, the next only looks at them."""
    count = 20_000
    folder = work / "cameras"
    view = {"camera": {"azimuth": 30.0, "elevation": 20.0, "focal_mm": 50.0}}
    text = json.dumps({"views": [view | {"file": f"{i:03d}.png"} for i in range(24)]})
    names = [f"{i:06d}" for i in range(count)]
    for name in names:
        (folder / "views" / name).mkdir(parents=True, exist_ok=True)
        (folder / "views" / name / "cameras.json").write_text(text)
    (folder / "views.safetensors").unlink(missing_ok=True)
    took = []
    for _ in range(2):
        before = time.process_time()
        Views(str(folder), names, 518)
        took.append((time.process_time() - before) / count * 1e6)
    return [
        f"Loose files: {took[0]:.0f} µs of processor time for the cameras.json of a shape at the first start, "
        f"{took[1]:.0f} µs at the next ones, which only look whether it has changed ({count:,} shapes)."
    ]


# --- files


def best(work: Callable[[], object]) -> float:
    """The seconds of the fastest of some tries."""
    seconds = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def file_table(work: Path) -> list[str]:
    lines = [
        "## Files of shapes",
        "",
        "Size of the files without and with zlib-1, and the speed at which a process reads them to arrays with their "
        "checksums, in MB of arrays per second, in turn on the same shapes.",
        "",
        "| shapes | arrays, KB each | file, of that | raw, MB/s | zlib-1, MB/s | loose, ms each | packed, ms each |",
        "|---|---|---|---|---|---|---|",
    ]
    for R in (64, 256):
        data_dir = str(work / f"real{R}")
        names, _ = list_shapes(data_dir, "train", R)
        names = names[:: max(1, len(names) // 200)]
        paths = [shape_path(data_dir, R, name) for name in names]
        raw, total = work / "raw", 0
        raw.mkdir(exist_ok=True)
        for path in paths:
            loaded = dict(zip(ARRAYS, read_arrays(path, *ARRAYS), strict=True))
            total += sum(array.nbytes for array in loaded.values())
            write_arrays(raw / path.name, loaded)
        out = work / f"packed{R}"
        pack(PackConfig(data_dir, str(out)))
        packed = [shape_path(str(out), R, name) for name in names]
        read = [
            best(lambda files=files: [read_arrays(file, *ARRAYS) for file in files])
            for files in ([raw / path.name for path in paths], paths)
        ]
        load = [best(lambda files=files: [load_shape(file, 3) for file in files]) for files in (paths, packed)]
        share = sum(path.stat().st_size for path in paths) / total
        speeds = " | ".join(f"{total / seconds / 1e6:.0f}" for seconds in read)
        each = " | ".join(f"{seconds / len(names) * 1e3:.1f}" for seconds in load)
        lines.append(f"| {len(names)} at {R}³ | {total / len(names) / 1e3:.0f} | {share:.3f} | {speeds} | {each} |")
    return lines


# --- the wait of a step


def waits(batches: Iterator, step: float) -> float:
    """The share of the time of a step that it waits for its batch, if the rest of it takes `step` seconds."""
    for _ in islice(batches, 2 * WORKERS):
        time.sleep(step)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(BATCHES):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(step)
    return waited / (time.perf_counter() - begin)


def wait_table(work: Path) -> list[str]:
    lines = [
        "## The wait of a step for its data",
        "",
        f"{WORKERS} workers; the step is a sleep, so the workers have both cores. Pictures of 1024² are decoded, "
        "cropped and scaled to 518². Latents have 16 channels, drawn at random; those of 512³ have the paper's number "
        "of tokens. The web server of the http packs runs on the same cores. `busy` is the processor time of one "
        "worker for a batch; with enough idle cores, w workers make a batch in busy / w.",
        "",
        "| batch | tokens | from | busy, s | wait at a step of | share |",
        "|---|---|---|---|---|---|",
    ]
    packed = work / "packed256"
    make_latents(work / "real256", packed)
    with serve(packed) as (url, _):
        for about, make, steps in (
            ("8 pictures and latents at 256³", latents_at(256), (0.18, 0.3)),
            ("8 pictures and latents as at 512³", latents_at(512), (0.8, 1.252)),
            ("64 pictures and structures at 256³", structures, (2.0,)),
            ("16 SDFs at 256³", shapes, (0.5, 1.0)),
        ):
            for place, data_dir in (("folder", str(work / "real256")), ("pack", str(packed)), ("http pack", url)):
                dataset = make(data_dir)
                begin = time.process_time()
                for number in range(3):
                    dataset[number]
                busy = (time.process_time() - begin) / 3
                for step in steps:
                    batches = load_batches(dataset, 0, 10**6, WORKERS, CPU)
                    share = waits(batches, step)
                    batches.close()
                    tokens = np.mean([dataset.sizes(number).sum() for number in range(BATCHES)])
                    cells = (
                        f"{about} | {tokens:,.0f} | {place} | {busy:.2f} | {step * 1e3:.0f} ms | {100 * share:.1f} %"
                    )
                    lines.append(f"| {cells} |")
                    print(lines[-1], flush=True)
    return lines


def latents_at(resolution: int) -> Callable:
    def make(data_dir: str) -> LatentViews:
        names, tokens = list_shapes(data_dir, "train", resolution)
        tokens_of = dict(zip(names, tokens.tolist(), strict=True))
        views = Views(data_dir, names, 518)
        tokens = np.array([tokens_of[name] for name in views.names])
        return LatentViews(data_dir, resolution, views, tokens, 8, 1, 200_000, 0, cache=False)

    return make


def structures(data_dir: str) -> StructureViews:
    views = Views(data_dir, list_shapes(data_dir, "train", 256)[0], 518)
    return StructureViews(views, 64, 1, 0, Structures(data_dir, views.names, 256, 1, 0), with_grids=True)


def shapes(data_dir: str) -> Shapes:
    return Shapes(data_dir, "train", (256,), 16, 200_000, 0, ALL)


if __name__ == "__main__":
    main()

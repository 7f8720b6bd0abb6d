"""What a training needs to go on as if it had not been interrupted."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmkd_ray.results import EpochRecord


@dataclass
class TrainingState:
    """Everything that changes while a module trains, besides the module and optimiser themselves.

    Attributes:
        key: of the run; a checkpoint of another run is not resumed.
        epoch: epochs finished.
        best: weights of the network to keep, from the epoch that did best on validation.
        seconds: of training so far, over all restarts.
    """

    key: str
    epoch: int = 0
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[EpochRecord] = field(default_factory=list)
    seconds: float = 0.0


@contextlib.contextmanager
def written_checkpoint(
    state: TrainingState, module: dict[str, Any], optimizer: dict[str, Any], scaler: dict[str, Any]
) -> Iterator[Path]:
    """Write a checkpoint to a temporary folder, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tmkd-checkpoint-") as folder:
        tensors = {"module": module, "optimizer": optimizer, "scaler": scaler, "best": state.best}
        torch.save(tensors, Path(folder) / "tensors.pt")
        facts = {
            "key": state.key,
            "epoch": state.epoch,
            "best_epoch": state.best_epoch,
            "best_accuracy": state.best_accuracy,
            "seconds": state.seconds,
            "history": [record.model_dump(mode="json") for record in state.history],
        }
        (Path(folder) / "state.json").write_text(json.dumps(facts))
        yield Path(folder)


def read_checkpoint(folder: Path, key: str) -> tuple[TrainingState, dict[str, Any]] | None:
    """Read a checkpoint of the run `key`; None if the folder holds another run's.

    Returns:
        The state, and the tensors: `module`, `optimizer` and `scaler` state dicts.
    """
    facts = json.loads((folder / "state.json").read_text())
    if facts["key"] != key:
        return None
    tensors = torch.load(folder / "tensors.pt", map_location="cpu", weights_only=True)
    history = [EpochRecord.model_validate(record) for record in facts.pop("history")]
    return TrainingState(**facts, best=tensors.pop("best"), history=history), tensors

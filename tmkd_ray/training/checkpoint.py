"""What a training needs to go on as if it had not been interrupted."""

import contextlib
import dataclasses
import json
import pickle
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmkd_ray.results import EpochRecord
from tmkd_ray.training.context import WorkerContext

_CHUNK = 1 << 24


@dataclass
class PartialEpoch:
    """What was trained of the epoch in progress.

    Attributes:
        steps: done. terms: names of the loss terms.
        sums: over samples and workers, see `TrainStep.__call__`.
        seconds: of training. data_seconds: of them, waiting for batches.
    """

    steps: int = 0
    terms: list[str] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0
    data_seconds: float = 0.0


@dataclass
class TrainingState:
    """Everything that changes while a module trains, besides the module and optimiser themselves.

    Attributes:
        key: of the run; a checkpoint of another run is not resumed.
        epoch: epochs finished.
        partial: of the epoch after these.
        best: weights of the network to keep, from the epoch that did best on validation: they are in every
            checkpoint, so that none is kept for their sake.
        seconds: of training so far, over all restarts.
    """

    key: str
    epoch: int = 0
    partial: PartialEpoch = field(default_factory=PartialEpoch)
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[EpochRecord] = field(default_factory=list)
    seconds: float = 0.0


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written."""


@contextlib.contextmanager
def written_checkpoint(state: TrainingState, tensors: dict[str, Any]) -> Iterator[Path]:
    """Write a checkpoint to a temporary folder, which is gone afterwards.

    Args:
        tensors: state dicts, by name.
    """
    with tempfile.TemporaryDirectory(prefix="tmkd-checkpoint-") as name:
        folder = Path(name)
        torch.save({**tensors, "best": state.best}, folder / "tensors.pt")
        facts = {
            "key": state.key,
            "epoch": state.epoch,
            "partial": dataclasses.asdict(state.partial),
            "best_epoch": state.best_epoch,
            "best_accuracy": state.best_accuracy,
            "seconds": state.seconds,
            "history": [record.model_dump(mode="json") for record in state.history],
        }
        content = {
            "facts": facts,
            "facts_crc32": _text_checksum(facts),
            "tensors_crc32": _file_checksum(folder / "tensors.pt"),
        }
        (folder / "state.json").write_text(json.dumps(content))
        yield folder


def read_checkpoint(folder: Path, key: str) -> tuple[TrainingState, dict[str, Any]] | None:
    """Read a checkpoint of the run `key`; None if the folder holds another run's.

    Returns:
        The state, and the tensors: state dicts, by name.

    Raises:
        DamagedCheckpointError: a file is missing or is not what was written.
    """
    try:
        content = json.loads((folder / "state.json").read_text())
        facts = content["facts"]
        if _text_checksum(facts) != content["facts_crc32"]:
            raise DamagedCheckpointError("state.json was changed")
        if facts["key"] != key:
            return None
        if _file_checksum(folder / "tensors.pt") != content["tensors_crc32"]:
            raise DamagedCheckpointError("tensors.pt is not what was written")
        tensors = torch.load(folder / "tensors.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(f"it cannot be read: {type(error).__name__}: {error}") from error
    history = [EpochRecord.model_validate(record) for record in facts.pop("history")]
    partial = PartialEpoch(**facts.pop("partial"))
    state = TrainingState(**facts, partial=partial, best=tensors.pop("best"), history=history)
    return state, tensors


def newest_checkpoint(context: WorkerContext, key: str) -> tuple[TrainingState, dict[str, Any]] | None:
    """Read the newest checkpoint that is whole on every worker; None if it is another run's, or there is none.

    Damaged ones are passed over, and the user is told.
    """
    found: tuple[TrainingState, dict[str, Any]] | None = None
    for folder in context.checkpoints():
        damage = None
        try:
            found = read_checkpoint(folder, key)
        except DamagedCheckpointError as error:
            damage = f"{folder.name}: {error}"
        # The workers must agree: to one of them the files may come damaged.
        damages = [text for text in context.gather(damage) if text is not None]
        if not damages:
            return found
        context.say(f"checkpoint {damages[0]}; it is passed over, the one before it serves")
    return None


def _text_checksum(facts: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _file_checksum(path: Path) -> int:
    """Return the CRC-32, which notices damage at several GB/s."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value

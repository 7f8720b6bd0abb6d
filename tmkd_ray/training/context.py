"""What the training loop needs of its surroundings: a plain process, or a Ray Train worker."""

import contextlib
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class WorkerContext(ABC):
    """One of `world_size` workers that train one module together."""

    rank: int
    world_size: int
    device: torch.device

    @abstractmethod
    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Hand over metrics and, on rank 0, a folder to keep. All ranks call it when a checkpoint is due."""

    @abstractmethod
    def latest_checkpoint(self) -> contextlib.AbstractContextManager[Path | None]:
        """Open the folder of the newest checkpoint of this run, on every rank; None at the first start."""

    @abstractmethod
    def say(self, line: str) -> None:
        """Show a line of progress to the user (rank 0 only)."""

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all workers."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()


class PlainContext(WorkerContext):
    """A plain process, alone or one of those that `torchrun` or a test started.

    Args:
        folder: holds the newest checkpoint.
        quiet: print no progress.

    With more than one worker the process group must be initialised.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu", quiet: bool = False) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.device = torch.device(device)
        self.folder = folder
        self.quiet = quiet

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is not None:
            incoming = self.folder / f"incoming-{os.getpid()}"
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copytree(checkpoint, incoming, dirs_exist_ok=True)
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
            incoming.rename(self.folder / "checkpoint")
        self.barrier()

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        newest = self.folder / "checkpoint"
        yield newest if newest.is_dir() else None

    def say(self, line: str) -> None:
        if self.rank == 0 and not self.quiet:
            print(line, file=sys.stderr, flush=True)

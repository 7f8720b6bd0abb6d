"""What the training loop needs of its surroundings: a plain process, or a Ray Train worker."""

import contextlib
import shutil
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tmkd_ray.results import EpochRecord


class WorkerContext(ABC):
    """One of `world_size` workers that train one module together.

    Attributes:
        resumable: whether the training in progress has a checkpoint; the loop keeps it up to date.
    """

    rank: int
    world_size: int
    device: torch.device
    resumable: bool = False

    @abstractmethod
    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Hand over metrics and, on rank 0, a folder to keep. All ranks call it when a checkpoint is due."""

    @abstractmethod
    def checkpoints(self) -> Iterator[Path]:
        """Yield the folders of the kept checkpoints, newest first, on every rank the same.

        A folder is there until the next one is asked for.
        """

    @abstractmethod
    def say(self, line: str) -> None:
        """Show a line of progress to the user (rank 0 only)."""

    def epoch_finished(self, history: Sequence[EpochRecord]) -> None:  # noqa: B027 (most have no use for it)
        """Hear of an epoch that was validated, on all ranks, before its checkpoint.

        Args:
            history: of all epochs so far, also of those before an interruption.
        """

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Within it warnings of an end are heard, where they must be listened for."""
        return contextlib.nullcontext()

    @abstractmethod
    def warned(self) -> bool:
        """Return whether this worker heard, since the last call, that it will soon be ended.

        All workers call it after the same steps.
        """

    @abstractmethod
    def give_way(self) -> None:
        """Do what a warning asks for, once there is a checkpoint. All workers call it."""

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all workers."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value (picklable), by rank."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()


class PlainContext(WorkerContext):
    """A plain process, alone or one of those that `torchrun` or a test started.

    SIGTERM is its warning: the training writes a checkpoint and exits with 143.

    Args:
        folder: holds the newest checkpoints.
        quiet: print no progress.
        keep: number of checkpoints.

    With more than one worker the process group must be initialised.
    """

    def __init__(
        self, folder: Path, device: str | torch.device = "cpu", quiet: bool = False, keep: int = 2
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.device = torch.device(device)
        self.folder = folder
        self.quiet = quiet
        self.keep = keep
        self._terminated = False

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is not None:
            kept = self._kept()
            number = int(kept[0].name.removeprefix("checkpoint-")) + 1 if kept else 0
            incoming = self.folder / "incoming"
            shutil.rmtree(incoming, ignore_errors=True)  # of a process that was killed while it wrote
            shutil.copytree(checkpoint, incoming)
            incoming.rename(self.folder / f"checkpoint-{number:08}")
            for old in self._kept()[self.keep :]:
                shutil.rmtree(old)
        self.barrier()

    def checkpoints(self) -> Iterator[Path]:
        yield from self._kept()

    def _kept(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), reverse=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python hears signals in that one alone
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self._terminated = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def warned(self) -> bool:
        return self._terminated

    def give_way(self) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    def say(self, line: str) -> None:
        if self.rank == 0 and not self.quiet:
            print(line, file=sys.stderr, flush=True)

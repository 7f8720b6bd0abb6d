"""The contract of a format: write a student, and read it back as something that runs."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.export.record import ExportRecord
from tmkd_ray.models import ImageClassifier
from tmkd_ray.progress import Rate
from tmkd_ray.registry import Registry
from tmkd_ray.teachers.pixels import Normalize

RECORD_FILE = "tmkd.json"
"""Name of the record where a format carries files beside the weights."""


class StudentNetwork(nn.Module):
    """A student that returns one tensor: what the exported graph computes.

    Args:
        output_name: `logits` or `feature`.
    """

    def __init__(self, model: ImageClassifier, output_name: str) -> None:
        super().__init__()
        self.model = model
        self.output_name = output_name

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, C] logits or [B, S] features of normalised float32 images [B, 3, H, W]."""
        output: Tensor = getattr(self.model(images), self.output_name)
        return output


@dataclass(frozen=True)
class Student:
    """A trained student, in evaluation mode on the CPU, and what is known of it."""

    model: ImageClassifier
    record: ExportRecord

    def network(self) -> StudentNetwork:
        """Return the network that is exported."""
        network = StudentNetwork(self.model, self.record.output_name).eval().requires_grad_(False)
        return network

    def example(self) -> Tensor:
        """Return an input [2, 3, H, W] to trace with: a batch of one would be taken for a constant."""
        size = self.record.image_size
        return torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)


@dataclass(frozen=True)
class ExportedModel:
    """An exported student that runs.

    Attributes:
        run: normalised float32 [B, 3, H, W], contiguous, to float32 [B, C or S].
        engine: what runs it, for people.
        network: the same as a module, where the format is one of PyTorch's own models or programs.
    """

    record: ExportRecord
    run: Callable[[Tensor], Tensor]
    engine: str = "PyTorch"
    network: nn.Module | None = None

    @torch.inference_mode()
    def __call__(self, images_BHWC: np.ndarray, batch_size: int = 64, label: str | None = None) -> Tensor:
        """Return float32 [B, C or S] of decoded uint8 images of the record's size.

        Args:
            label: of progress lines; None: there are none.
        """
        normalize = Normalize(self.record.mean, self.record.std)
        batches: Iterable[Tensor] = torch.split(torch.from_numpy(images_BHWC), batch_size)
        if label is not None:
            progress = Rate(label, -(-len(images_BHWC) // batch_size), "batches", quiet_if_short=True)
            batches = progress.over(batches)
        return torch.cat([self.run(normalize(batch).contiguous()).float() for batch in batches])


class Exporter(ABC):
    """A format.

    Attributes:
        description: one line for the help.
        suffix: of the file's name; a folder's has none.
        tolerance: the largest difference to the student's logits that is rounding, not a mistake.
        runs_code: whether reading a file may run a program that its author put into it.
    """

    description: ClassVar[str]
    suffix: ClassVar[str]
    tolerance: ClassVar[float] = 1e-5
    runs_code: ClassVar[bool] = False

    def check(self, record: ExportRecord) -> None:  # noqa: B027 (most formats take every student)
        """Refuse a student that the format cannot hold, before anything is computed.

        Raises:
            UserError: it cannot; or a package is missing.
        """

    @abstractmethod
    def write(self, student: Student, path: str) -> None:
        """Write the student as the local file or folder `path`."""

    @abstractmethod
    def read(self, path: str) -> ExportedModel:
        """Read the local file or folder `path`.

        Raises:
            UserError: it is damaged, of another origin, or a package is missing.
        """


EXPORTERS: Registry[type[Exporter]] = Registry("export format")


def require_packages(purpose: str, *names: str) -> None:
    """Check that packages of the extra `export` are installed.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{purpose} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}: "
            "pip install 'tmkd-ray[export]'"
        )


def unreadable(path: str, what: str, error: Exception) -> UserError:
    """Return the error for a file that its own library cannot read."""
    reason = str(error).strip().partition("\n")[0][:200]
    return UserError(
        f"cannot read {path} as {what} ({type(error).__name__}: {reason}). "
        "Is the file whole, and of this format?"
    )

"""A training that stops after an epoch's checkpoint, as if its process had died."""

from pathlib import Path
from typing import Any

from tmkd_ray.training.context import PlainContext


class StopError(Exception):
    pass


class StoppingContext(PlainContext):
    def __init__(self, folder: Path, reports: int) -> None:
        super().__init__(folder, quiet=True)
        self.reports = reports

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        super().report(metrics, checkpoint)
        self.reports -= 1
        if self.reports == 0:
            raise StopError

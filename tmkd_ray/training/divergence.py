"""Notice that a training has diverged, without waiting for a GPU at every step, and say on which samples."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.training.context import WorkerContext

_MAX_IDS = 100_000
"""Sample ids in `diverged.json`, of each worker."""


class DivergedError(UserError):
    """The loss became NaN, infinite or far too large; the message names the terms and the epoch."""


class LossWatch:
    """Keeps what the steps since the last look returned, on the device.

    Args:
        sample_ids: see `TrainTask.sample_ids`.
        folder: where `diverged.json` goes; None: it is not written.
        max_loss: of a step, a worker's mean; beyond it in size the loss has exploded. None: infinity.
    """

    def __init__(
        self, sample_ids: Callable[[Tensor], list[str]], folder: str | None, max_loss: float | None = None
    ) -> None:
        self.sample_ids = sample_ids
        self.folder = folder
        self.max_loss = float("inf") if max_loss is None else max_loss
        self._steps: list[tuple[int, Tensor, Tensor | None]] = []

    def note(self, step: int, row: Tensor, batch: Any) -> None:
        """Note the sums that a step (from 0) returned and the samples it saw."""
        self._steps.append((step, row, getattr(batch, "indices", None)))

    def num_bad(self) -> Tensor:
        """Return the number of this worker's steps that diverged, on the device."""
        rows = torch.stack([row for _, row, _ in self._steps])
        return self._is_bad(rows).sum().double()

    def _is_bad(self, rows: Tensor) -> Tensor:
        """Return bool [...] of sums [..., R]; what is NaN is below no bound."""
        exploded = ~(rows[..., 0].abs() <= self.max_loss * rows[..., -1])
        return exploded | (~rows.isfinite()).any(dim=-1)

    def clear(self) -> None:
        self._steps = []

    def diverged(self, epoch: int, terms: Sequence[str], context: WorkerContext) -> DivergedError:
        """Return the error to raise, which is the same on all workers, and write `diverged.json`.

        Args:
            epoch: from 0.
        """
        names = ["loss", *terms]
        reports = [report for report in context.gather(self._first_bad(names)) if report is not None]
        assert reports
        first = min(report["step"] for report in reports)
        reports = [report for report in reports if report["step"] == first]
        bad = [name for name in names if any(name in report["not_finite"] for report in reports)]
        if bad:
            what = f"{', '.join(bad)} is not finite"
        else:
            means = max((report["finite"] for report in reports), key=lambda means: abs(means["loss"]))
            term = max(terms, key=lambda name: abs(means[name]), default="loss")
            what = (
                f"the loss, {means['loss']:.3g} with its largest term {term} {means[term]:.3g}, "
                f"is beyond training.max_loss, {self.max_loss:g},"
            )
        where = ""
        if self.folder is not None:
            path = storage.join(self.folder, "diverged.json")
            where = f"; {path} lists the samples of the step"
            if context.rank == 0:
                facts = {"epoch": epoch + 1, "step": first + 1, "not_finite": bad, "workers": reports}
                storage.write_bytes(path, json.dumps(facts, indent=1).encode())
            context.barrier()
        return DivergedError(
            f"training diverged in epoch {epoch + 1}: {what} at step {first + 1}; "
            "lower training.learning_rate, set training.max_gradient_norm, or lower that term's weight" + where
        )

    def _first_bad(self, names: Sequence[str]) -> dict[str, Any] | None:
        for step, row, indices in self._steps:
            if bool(self._is_bad(row)):
                *sums, _, count = row.tolist()
                means = {name: value / count for name, value in zip(names, sums, strict=True)}
                # JSON has no number for those that matter here.
                not_finite = {k: str(v) for k, v in means.items() if not abs(v) < float("inf")}
                ids = [] if indices is None else self.sample_ids(indices)[:_MAX_IDS]
                finite = {name: value for name, value in means.items() if name not in not_finite}
                return {"step": step, "not_finite": not_finite, "finite": finite, "sample_ids": ids}
        return None

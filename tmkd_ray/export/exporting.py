"""Export a student: write it, read it back, compare it with the student on real images, then publish it."""

import os
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.export.base import ExportedModel, Exporter, Student
from tmkd_ray.progress import say
from tmkd_ray.teachers.pixels import Normalize

_BATCHES = (1, 7)
"""Batch sizes that the file must take, beside all images at once: none is the one it was traced with."""


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from its student.

    Attributes:
        max_difference: largest absolute difference of an output (a logit; of an encoder a feature).
        max_output: largest absolute output of the student, to judge it by.
        num_images: compared.
    """

    max_difference: float
    max_output: float
    num_images: int

    def __str__(self) -> str:
        return (
            f"largest difference to the student {self.max_difference:.3g} "
            f"(outputs up to {self.max_output:.3g}; {self.num_images} images)"
        )


@torch.inference_mode()
def measure_parity(student: Student, exported: ExportedModel, images_NHWC: np.ndarray) -> Parity:
    """Compare on uint8 images of the student's size, in batches of several sizes."""
    normalized = Normalize(student.record.mean, student.record.std)(torch.from_numpy(images_NHWC)).contiguous()
    network = student.network()
    difference, largest = 0.0, 0.0
    for size in (*_BATCHES, len(normalized)):
        batch = normalized[:size]
        expected = network(batch).double()
        actual = exported.run(batch).double()
        if actual.shape != expected.shape:
            raise UserError(
                f"the exported file puts out {list(actual.shape)} for {len(batch)} images, the student "
                f"{list(expected.shape)}: the format does not suit {student.record.model}"
            )
        gap = (actual - expected).abs().max().item()
        difference = float("inf") if not np.isfinite(gap) else max(difference, gap)
        largest = max(largest, expected.abs().max().item())
    return Parity(difference, largest, len(images_NHWC))


def export_student(
    student: Student, exporter: Exporter, out: str, images_NHWC: np.ndarray, tolerance: float | None = None
) -> Parity:
    """Write the file or folder `out`, whole and checked or not at all.

    Args:
        images_NHWC: uint8, real ones, of the student's size.
        tolerance: None takes the format's.

    Raises:
        UserError: the format cannot hold the student, its outputs differ by more than the tolerance, or `out`
            cannot be written.
    """
    exporter.check(student.record)
    with tempfile.TemporaryDirectory(prefix="tmkd-") as folder:
        path = os.path.join(folder, os.path.basename(out.rstrip("/")))
        say(f"export: writing {student.record.model} as {exporter.description}")
        exporter.write(student, path)
        say(f"export: comparing it with the student on {len(images_NHWC)} images")
        parity = measure_parity(student, exporter.read(path), images_NHWC)
        limit = exporter.tolerance if tolerance is None else tolerance
        if not parity.max_difference <= limit:
            raise UserError(
                f"not exported: {parity}, which is above the tolerance {limit:g}. Another format may suit this "
                "network better; --tolerance says what is still right"
            )
        publish(folder, os.path.dirname(storage.absolute(out)))
    return parity


def publish(folder: str, target: str) -> None:
    """Copy what lies in a temporary folder to where it belongs, each file whole or not at all."""
    for parent, _, names in os.walk(folder):
        below = os.path.relpath(parent, folder)
        for name in sorted(names):
            parts = [name] if below == "." else [*below.split(os.sep), name]
            with open(os.path.join(parent, name), "rb") as file:
                storage.write_bytes(storage.join(target, *parts), file.read())

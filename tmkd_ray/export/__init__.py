"""Trained students as files for other programs: one format a file, each with how to read it back.

What every format carries is in `record.py`, what a format must do in `base.py`. To add one, add a file that
registers an `Exporter` subclass with `@EXPORTERS.register("name")`.
"""

from tmkd_ray.export.base import EXPORTERS, ExportedModel, Exporter, Student
from tmkd_ray.export.record import ExportRecord
from tmkd_ray.registry import import_submodules

import_submodules(__name__, __path__)

from tmkd_ray.export.reading import load_exported  # noqa: E402 (chooses among the registered formats)

__all__ = ["EXPORTERS", "ExportRecord", "ExportedModel", "Exporter", "Student", "load_exported"]

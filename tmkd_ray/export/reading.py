"""Open an exported file of any format, by its name."""

import os

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.export.base import EXPORTERS, ExportedModel, Exporter


def format_of(path: str) -> Exporter:
    """Return the format of a local file or folder, by its suffix; a folder is Hugging Face's.

    Raises:
        UserError: there is nothing, or no format has this suffix.
    """
    if os.path.isdir(path):
        return EXPORTERS.get("hf")()
    if not os.path.isfile(path):
        raise UserError(f"there is no file or folder {path}; give what `tmkd export` wrote")
    by_suffix = {EXPORTERS.get(name).suffix: name for name in EXPORTERS if EXPORTERS.get(name).suffix}
    suffix = os.path.splitext(path)[1]
    if suffix not in by_suffix:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in sorted(by_suffix.items()))
        raise UserError(f"{path}: unknown kind of model file; known: {known}, and folders (hf)")
    return EXPORTERS.get(by_suffix[suffix])()


def load_exported(path: str) -> ExportedModel:
    """Read what `tmkd export` wrote, whatever its format; needs neither the run nor its data.

    Weights and ONNX are read without running code; a `.pt` or `.pt2` holds a program (`Exporter.runs_code`).

    Raises:
        UserError: there is no such file, it is damaged or of another origin, or a package is missing.
    """
    path = storage.absolute(path)
    return format_of(path).read(path)

"""Class names' embeddings of another CLIP's text tower, for a CLIP whose text side is locked to them."""

import io
import zipfile
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmkd_ray import storage
from tmkd_ray.errors import UserError


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def read_text_features(path: str, class_names: Sequence[str]) -> Tensor:
    """Read the embedding of each class name: float32 [C, E], unit length, in the order of the names.

    Args:
        path: an npz file of arrays `features` [names, E] and `names`; more names than are wanted will do. Case,
            and `_` for a space, make no difference.

    Raises:
        UserError: the file cannot be read, is something else, or lacks a class.
    """
    where = f"teacher.text.text_features: {path}"
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
            features, names = arrays["features"], arrays["names"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{where}: no npz file of arrays `features` and `names`: {error}") from error
    if features.ndim != 2 or len(features) != len(names) or features.dtype.kind != "f":
        raise UserError(
            f"{where}: `features` has shape {features.shape} and type {features.dtype}, `names` "
            f"{names.shape}; a row of floats for each name is wanted"
        )
    rows = {_plain(str(name)): row for row, name in enumerate(names)}
    missing = [name for name in class_names if _plain(name) not in rows]
    if missing:
        raise UserError(f"{where}: it lacks {len(missing)} of the classes, the first {missing[0]!r}")
    chosen = torch.from_numpy(features[[rows[_plain(name)] for name in class_names]]).float()
    if not bool((chosen.norm(dim=1) > 0).all() and chosen.isfinite().all()):
        raise UserError(f"{where}: an embedding is zero or not finite")
    return F.normalize(chosen, dim=1)

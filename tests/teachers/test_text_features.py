"""Embeddings of class names that a CLIP's text side is locked to."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tmkd_ray.errors import UserError
from tmkd_ray.teachers.text_features import read_text_features

NAMES = np.array(["Sea_Horse", "aquarium fish", "bee"])
FEATURES = np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4)


def saved(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "features.npz", **arrays)
    return str(folder / "features.npz")


def test_rows_come_in_the_order_of_the_classes(tmp_path: Path) -> None:
    path = saved(tmp_path, features=FEATURES, names=NAMES)
    found = read_text_features(path, ["bee", "sea horse"])
    expected = FEATURES[[2, 0]] / np.linalg.norm(FEATURES[[2, 0]], axis=1, keepdims=True)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"features": FEATURES, "names": NAMES[[0, 1, 1]]}, "lacks 1 of the classes, the first 'bee'"),
        ({"features": FEATURES}, "names is not a file in the archive"),
        ({"features": FEATURES[:2], "names": NAMES}, "a row of floats for each name"),
        ({"features": FEATURES * np.nan, "names": NAMES}, "zero or not finite"),
        ({"features": FEATURES * 0, "names": NAMES}, "zero or not finite"),
        ({"features": FEATURES, "names": NAMES.astype(object)}, "allow_pickle=False"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], problem: str
) -> None:
    path = saved(tmp_path, **arrays)
    with pytest.raises(UserError, match=problem) as caught:
        read_text_features(path, ["bee", "sea horse"])
    assert path in str(caught.value)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "features.npz").write_text("not an archive")
    with pytest.raises(UserError, match="no npz file of arrays"):
        read_text_features(str(tmp_path / "features.npz"), ["bee"])

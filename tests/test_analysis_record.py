"""The analysis file: what is written is read, and nothing else is."""

import io
import json

import numpy as np
import pytest

from tmkd_ray.analysis_record import Analysis, NetworkFindings, ViewGallery, analysis_path
from tmkd_ray.errors import UserError


def network(**changes):
    fields = {
        "key": "kd",
        "role": "student",
        "seeds": 2,
        "confusion": np.array([[0, 0, 5], [0, 1, 2], [1, 1, 3]]),
        "bin_counts": np.array([4, 0, 6]),
        "bin_hits": np.array([1, 0, 6]),
        "bin_confidences": np.array([2.0, 0.0, 5.5]),
        "correlation_gap": np.array([[0.0, 0.5], [0.5, 0.0]], dtype=np.float16),
        "mean_correlation_gap": 0.5,
    }
    return NetworkFindings(**(fields | changes))


def written(tmp_path, **changes):
    path = str(tmp_path / "results-analysis.npz")
    images = np.arange(48, dtype=np.uint8).reshape(1, 1, 4, 4, 3)
    gallery = ViewGallery(images=images, view_names=("original",), labels=("a\udcffb",))
    Analysis(created="2026-01-31", gallery=gallery, networks=(network(),), num_images=7, **changes).save(path)
    return path


def test_what_is_written_is_read(tmp_path):
    found = Analysis.load(written(tmp_path, projected_labels=np.array([1, 0])))
    assert (found.created, found.num_images, found.view_wins, found.grad_cam) == ("2026-01-31", 7, None, None)
    assert found.gallery is not None
    assert found.gallery.labels == ("a\\udcffb",)
    np.testing.assert_array_equal(found.gallery.images.ravel(), np.arange(48))
    np.testing.assert_array_equal(found.projected_labels, [1, 0])
    (kd,) = found.networks
    assert kd.projection is None
    assert kd.correlation_gap is not None
    assert kd.correlation_gap.dtype == np.float16
    np.testing.assert_array_equal(kd.confusion_matrix(3), [[5, 2, 0], [0, 3, 0], [0, 0, 0]])
    assert kd.ece == pytest.approx((abs(1 - 2.0) + abs(6 - 5.5)) / 10)


def test_the_file_holds_no_pickles(tmp_path):
    path = written(tmp_path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_a_pickle_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.savez(tmp_path / "x-analysis.npz", record=np.array([Trap()], dtype=object))
    with pytest.raises(UserError, match="is no analysis file"):
        Analysis.load(str(tmp_path / "x-analysis.npz"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record, arrays: record.update(schema_version=2), "has schema_version 2, .* reads 1"),
        (lambda record, arrays: record.update(surprise=1), "does not fit the schema"),
        (lambda record, arrays: record.pop("schema_version"), "is no analysis file"),
        (lambda record, arrays: arrays.pop("gallery.images"), "does not fit the schema"),
        (lambda record, arrays: arrays.update({"gallery.images": np.zeros(3)}), "does not fit the schema"),
        (
            lambda record, arrays: arrays.update({"networks.0.bin_confidences": np.array([np.nan])}),
            "does not fit the schema",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    path = written(tmp_path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    record = json.loads(arrays.pop("record").tobytes())
    change(record, arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, record=np.frombuffer(json.dumps(record).encode(), dtype=np.uint8))
    (tmp_path / "results-analysis.npz").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=message):
        Analysis.load(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04nonsense", b"{}"])
def test_what_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="is no analysis file"):
        Analysis.load(str(tmp_path / "x.npz"))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="images: expected"):
        ViewGallery(images=np.zeros((2, 1, 4, 4, 3), np.uint8), view_names=("a",), labels=("x",))
    with pytest.raises(ValueError, match="weights: expected"):
        ViewGallery(
            images=np.zeros((1, 1, 4, 4, 3), np.uint8),
            view_names=("a",),
            labels=("x",),
            weights=np.zeros((1, 2)),
        )


def test_each_results_file_has_its_own():
    assert analysis_path("/runs/a/results.json") == "/runs/a/results-analysis.npz"
    assert analysis_path("s3://b/a/ablation.json") == "s3://b/a/ablation-analysis.npz"

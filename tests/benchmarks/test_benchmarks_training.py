"""Each benchmark of training runs, at the smallest sizes, and says what it measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_runs import load, run, run_here


def by_name(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a benchmark's results by their names."""
    for line in results:
        assert line["ratio_least"] <= line["ratio"] <= line["ratio_most"]
        assert line["hardware"]
        assert line["torch"] == torch.__version__
    return {line["name"]: line for line in results}


def test_epoch() -> None:
    options = "--rounds 1 --images 24 --online-images 16 --batch-size 8 --threads 1 --student resnet8"
    options += " --teacher resnet8 --clip-layers 1 --clip-width 32"
    lines = by_name(run_here("epoch.py", *options.split()))
    assert set(lines) == {"cached_over_student_only", "online_over_cached"}
    for line in lines.values():
        assert (line["n"], line["student"], line["batch_size"], line["images"]) == (1, "resnet8", 8, 24)
        assert (line["feature_width"], line["clip_width"], line["views"]) == (64, 32, 3)
        assert (line["knowledge"], line["precision"], line["threads"]) == ("float16", "float32", 1)
    alone, online = lines["cached_over_student_only"], lines["online_over_cached"]
    cached = alone["cached_images_per_s"]["median"]
    assert cached == online["cached_images_per_s"]["median"]
    assert alone["ratio"] == pytest.approx(alone["alone_images_per_s"]["median"] / cached, rel=0.02)
    assert online["ratio"] == pytest.approx(cached / online["online_images_per_s"]["median"], rel=0.02)
    assert (online["online_images"], online["teacher"]) == (16, "resnet8")
    assert 0 < alone["cached_data_share"]["median"] < 1
    assert 0 < online["online_data_share"]["median"] < 1


def test_loader() -> None:
    options = ["--rounds", "2", "--images", "24", "--batch-size", "8", "--student", "resnet8", "--threads", "1"]
    lines = by_name(run_here("loader.py", *options))
    assert set(lines) == {"loader_share", "loader_share_mapped"}
    for line in lines.values():
        assert (line["n"], line["images"], line["batch_size"], line["variants"]) == (2, 24, 8, 4)
        assert 0 < line["share_percent"]["median"] == pytest.approx(100 * line["ratio"], abs=0.051)
        least = 100 * line["loader_ms"]["least"] / line["step_ms"]["most"]
        most = 100 * line["loader_ms"]["most"] / line["step_ms"]["least"]
        assert 0.95 * least <= line["share_percent"]["least"] <= line["share_percent"]["most"] <= 1.05 * most
        assert 0 < line["data_share"]["median"] < 1


@pytest.mark.ray
def test_torchrun() -> None:
    options = ["--rounds", "1", "--images", "24", "--batch-size", "8", "--epochs", "2", "--student", "resnet8"]
    lines = by_name(run("torchrun.py", *options))
    line = lines["ray_train_over_torchrun"]
    assert (line["n"], line["workers"], line["threads"], line["backend"]) == (1, 2, 1, "gloo")
    mine, theirs = (line["steps_per_s"][side]["median"] for side in ("ray", "torchrun"))
    assert line["ratio"] == pytest.approx(mine / theirs, rel=0.01)
    assert line["ratio_with_checkpoints"]["median"] > 0
    first = {side: line["first_step_s"][side]["median"] for side in ("ray", "torchrun")}
    assert all(seconds > 0.5 for seconds in first.values())  # both import torch
    parts = line["ray_first_step_parts_s"]
    assert list(parts) == ["imports", "ray", "workers", "data_and_network", "step"]
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(first["ray"], abs=0.3)


def test_steady_steps_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = load(monkeypatch, "torchrun").rates
    # Epochs of three steps: a slow first one; then steps of 2 s, with 4 s and 6 s between the epochs.
    ended = [10.0, 20.0, 30.0, 36.0, 38.0, 40.0, 48.0, 50.0, 52.0]
    within, everything = rates(ended, 3)
    assert within == pytest.approx(1 / 2)
    assert everything == pytest.approx(6 / 22)


def test_made_knowledge_is_what_a_store_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    students = load(monkeypatch, "students")
    arrays = students.draw_knowledge(students.Sizes(images=7, variants=2, feature_width=5, clip_width=6))
    found = {
        name: (value.dtype, value.shape[1:])
        for name, value in vars(arrays).items()
        if isinstance(value, np.ndarray) and name not in ("ids", "labels")
    }
    wanted = arrays.layout.arrays()
    assert found == {"images": wanted.pop("image"), **wanted}
    norm = np.linalg.norm(arrays.clip_embedding.astype(np.float32), axis=-1)
    np.testing.assert_allclose(norm, 1, atol=2e-3)
    mapped = students.mapped(arrays, tmp_path)
    for name in found:
        assert isinstance(getattr(mapped, name), np.memmap)
        np.testing.assert_array_equal(getattr(mapped, name), getattr(arrays, name))

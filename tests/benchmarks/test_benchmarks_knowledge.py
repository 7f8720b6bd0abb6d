"""Each benchmark of the knowledge's road runs, at the smallest sizes, and says what it measured."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from benchmark_runs import FOLDER, run, run_here

from tmkd_ray.datasets.decode import load_images


def load(name: str) -> ModuleType:
    """Import a module of the benchmarks' folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ray
def test_views() -> None:
    (views,) = run(
        "views.py",
        *("--sizes", "32", "--seconds", "1", "--rounds", "1", "--processes", "1"),
        *("--images", "96", "--shard-rows", "32", "--variants", "2"),
    )
    assert (views["name"], views["baseline"], views["n"]) == ("views_32", "multiprocessing pool", 1)
    assert (views["images_per_shard"], views["image_size"], views["processes"]) == (64, 32, 1)
    rates = (views[f"{side}_images_per_s"]["median"] for side in ("ray", "pool"))
    mine, theirs = rates
    assert mine > 0
    assert theirs > 0
    assert views["ratio"] == pytest.approx(mine / theirs, rel=0.02)
    assert views["ray_startup_s"]["median"] > 0
    assert views["hardware"]


@pytest.mark.ray
def test_teachers() -> None:
    (teachers,) = run(
        "teachers.py",
        *("--model", "resnet8", "--seconds", "0.5", "--rounds", "1", "--threads", "1"),
        *("--shard-images", "8", "--batch-size", "10"),
    )
    assert (teachers["name"], teachers["baseline"], teachers["n"]) == ("teachers", "plain PyTorch loop", 1)
    assert (teachers["model"], teachers["threads"], teachers["batch_size"]) == ("resnet8", 1, 10)
    assert teachers["images_per_shard"] == 8 * 3
    mine, theirs = (teachers[f"{side}_images_per_s"]["median"] for side in ("ray", "loop"))
    assert teachers["ratio"] == pytest.approx(mine / theirs, rel=0.02)


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_knowledge_memory() -> None:
    (memory,) = run(
        "knowledge_memory.py",
        *("--images", "200", "--factor", "2", "--rounds", "1", "--variants", "1", "--shard-rows", "50"),
        "knowledge.views.max_size=1",
    )
    assert (memory["name"], memory["n"], memory["images"]) == ("knowledge_memory", 1, [200, 400])
    peaks = [memory["peak_mb"][size]["median"] for size in ("200", "400")]
    # The driver, Ray's own processes and the actors hold PyTorch each.
    assert all(300 < peak < 20_000 for peak in peaks)
    assert memory["ratio"] == pytest.approx(peaks[1] / peaks[0], rel=0.01)
    assert all(store["median"] > 0 for store in memory["object_store_mb"].values())
    assert all(count["median"] >= 5 for count in memory["processes"].values())


@pytest.fixture(scope="module")
def sizes() -> dict[str, dict[str, Any]]:
    lines = run_here("knowledge_size.py", "--images", "16")
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_knowledge_size(sizes: dict[str, dict[str, Any]], dtype: str, item: int) -> None:
    line = sizes[f"knowledge_size_{dtype}"]
    assert (line["n"], line["feature_width"], line["clip_width"], line["views"]) == (16, 256, 512, 3)
    assert line["target_kb"] == {"float32": None, "float16": 5.0, "int8": 2.6}[dtype]
    scales = 4 * 2 * 3 if dtype == "int8" else 0
    uncompressed = ((256 + 512) * 3 * item + scales + 2 * 12) / 1024
    assert line["kb_without_images_uncompressed"] == pytest.approx(uncompressed, abs=2e-3)
    for image_format, by_variants in line["kb"].items():
        assert by_variants["1"] > by_variants["4"] > by_variants["8"], image_format
    if dtype != "int8":  # not compressed: the numbers, and little more
        assert line["kb"]["reference"]["8"] >= (256 + 512) * 3 * item / 1024
    assert line["kb"]["raw"]["4"] > line["kb"]["reference"]["4"] == line["kb_without_images"]
    assert line["ratio"] == pytest.approx(
        line["kb"]["raw"]["4"] / sizes["knowledge_size_float32"]["kb"]["raw"]["4"], abs=1e-3
    )


def test_effect_of_rounding_on_the_fused_logits(sizes: dict[str, dict[str, Any]]) -> None:
    exact, half, byte = (
        sizes[f"knowledge_size_{dtype}"]["fused_logits"] for dtype in ("float32", "float16", "int8")
    )
    assert (exact["max_difference"], exact["top1_agreement"]) == (0, 1)
    assert 0 < half["mean_difference"] < byte["mean_difference"] < byte["logits_std"]
    assert 0 <= half["kl"] < byte["kl"]
    assert half["top1_agreement"] > 0.99


def test_effect_by_hand() -> None:
    effect = load_size().effect(np.array([[[1.0, 0.0]], [[0.0, 1.5]]]), np.array([[[1.0, 0.0]], [[1.0, 0.5]]]))
    assert effect["max_difference"] == 1
    assert effect["mean_difference"] == 0.5
    assert effect["top1_agreement"] == 0.5
    p, q = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(1.5))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert effect["kl"] == pytest.approx(expected / 2)


def load_size() -> ModuleType:
    sys.path.insert(0, str(FOLDER))  # where a script finds its neighbour, `measuring`
    try:
        return load("knowledge_size")
    finally:
        sys.path.remove(str(FOLDER))


def test_steady_rate_leaves_out_start_up_and_what_piled_up() -> None:
    finished = load("measuring").Finished(started=100.0)
    finished.add(110.0, 5, first_stage=109.0)
    finished.add(111.0, 5, first_stage=109.5)  # computed while the writer started: not counted
    finished.add(114.0, 5, first_stage=112.5)
    finished.add(116.0, 5, first_stage=115.0)
    finished.add(118.0, 5, first_stage=117.0)
    assert finished.startup_s == 10
    rate, seconds = finished.steady(lead_in_s=2.0)
    assert seconds == pytest.approx(6.0)
    assert rate == pytest.approx(15 / 6)


def test_steady_rate_of_a_run_too_short_for_its_later_stage() -> None:
    finished = load("measuring").Finished(started=0.0)
    for at, first_stage in ((10.0, 1.0), (11.0, 2.0), (12.0, 3.0), (13.0, 4.0)):
        finished.add(at, 5, first_stage)
    assert finished.steady(lead_in_s=1.0) == (pytest.approx(10 / 11), pytest.approx(11.0))


def test_made_images_are_read_back_and_have_the_spectrum_of_photographs(tmp_path: Path) -> None:
    measuring = load("measuring")
    images = measuring.synthetic_images(64, 32)
    assert images.shape == (64, 32, 32, 3)
    measuring.write_dataset(tmp_path, images, "PNG")
    dataset = measuring.open_dataset(tmp_path, 32)
    loaded = load_images(dataset, "train", dataset.index("train"))
    np.testing.assert_array_equal(loaded.images, images)
    assert loaded.labels.tolist() == list(range(64))

    power = (np.abs(np.fft.fft2(images[..., 1].astype(np.float64), axes=(1, 2))) ** 2).mean(axis=0)
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)[None])
    some = (frequency > 0.04) & (frequency < 0.3)
    slope = np.polyfit(np.log(frequency[some]), np.log(power[some]), 1)[0]
    assert -2.3 < slope < -1.7

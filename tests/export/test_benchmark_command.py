"""`tmkd benchmark`: what it measures, counts and tells. No time is asserted."""

import json
import re
import time

import pytest
import torch
from torch import nn

from tmkd_ray.cli import main
from tmkd_ray.export import latency
from tmkd_ray.export.latency import Contestant, Spread, count_flops, measure_speeds
from tmkd_ray.export.record import ExportRecord


def record(**changes) -> ExportRecord:
    fields = {
        "model": "resnet8", "class_names": ("a", "b"), "feature_width": 4, "image_size": 8, "mean": (0, 0, 0),
        "std": (1, 1, 1), "parameters": 1,
    }  # fmt: skip
    return ExportRecord(**(fields | changes))


def test_flops_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7)
    )
    # 3·5 kernels of 3×3 on 8×8 pixels, then 5×7, a multiply-add as two.
    assert count_flops(network, 8) == 2 * (3 * 5 * 9 * 64 + 5 * 7)


def test_quartiles():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_the_clock_is_read_right(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def run(images):
            assert images.shape[1:] == (3, 8, 8)
            now[0] += seconds * len(images)

        return run

    fast = Contestant("fast", "x", taking(0.002), record(figures={"test_accuracy": 0.5}))
    slow = Contestant("slow", "y", taking(0.1), record())
    seen = []
    speeds = measure_speeds([fast, slow], 10, 4, lambda rounds: seen.append(len(rounds)) or rounds)
    assert seen == [4]
    assert [speed.contestant.name for speed in speeds] == ["fast", "slow"]
    assert speeds[0].latency_ms.median == pytest.approx(2.0)
    assert speeds[1].latency_ms.upper == pytest.approx(100.0)
    assert speeds[0].images_per_second.lower == pytest.approx(500.0)
    assert speeds[1].images_per_second.median == pytest.approx(10.0)
    assert speeds[0].accuracy_per_ms == pytest.approx(25.0)
    assert speeds[1].accuracy_per_ms is None


def test_the_command(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "_WARMUP_S", 0.01)
    arguments = ["export", str(run_folder), "--format", "torchscript", "--out", str(tmp_path / "student.pt")]
    assert main(arguments) == 0
    capsys.readouterr()
    threads = torch.get_num_threads()
    options = ["--rounds", "2", "--batch", "3", "--threads", "1", "--json", str(tmp_path / "speed.json")]
    code = main(
        ["benchmark", str(run_folder), str(tmp_path / "student.pt"), "--teacher", str(run_folder), *options]
    )
    torch.set_num_threads(threads)
    assert code == 0
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if re.match(r"\| (tmkd|student|teacher)", line)]
    assert [(row[0], row[1]) for row in rows] == [
        ("| tmkd seed 0: resnet8", "PyTorch"),
        ("| tmkd seed 0: resnet8", "ONNX Runtime"),
        ("| student.pt", "TorchScript"),
        ("| teacher: resnet14", "PyTorch"),
        ("| teacher: resnet14", "ONNX Runtime"),
    ]
    assert "images/s, batch 3" in out
    content = json.loads((tmp_path / "speed.json").read_text())
    assert (content["threads"], content["batch_size"], content["rounds"]) == (1, 3, 2)
    models = content["models"]
    assert [entry["accuracy"] for entry in models] == [0.8125, 0.8125, 0.8125, 0.9375, 0.9375]
    assert [entry["parameters"] for entry in models[::4]] == [78_042, 175_258]
    assert models[0]["flops"] == models[1]["flops"] == models[2]["flops"] < models[3]["flops"]
    for entry in models:
        assert 0 < entry["latency_ms"]["lower"] <= entry["latency_ms"]["median"] <= entry["latency_ms"]["upper"]
        assert entry["accuracy_percent_per_ms"] == pytest.approx(
            100 * entry["accuracy"] / entry["latency_ms"]["median"]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is at least 1, not 0"),
        (["--teacher", "nowhere"], "no run's folder"),
        (["--seed", "9"], "no student of tmkd with seed 9"),
    ],
)
def test_wrong_arguments(run_folder, capsys, arguments, message):
    assert main(["benchmark", str(run_folder), "--engine", "pytorch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["benchmark", str(run_folder), "--device", "cuda"]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err

"""The study of CIFAR-100: every cell is a legal configuration, and its tables are right."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tmkd_ray.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "cifar100"
sys.path.insert(0, str(FOLDER))

import study  # noqa: E402
import tables  # noqa: E402

STUDY = study.read_study(FOLDER / "study.yaml")


@pytest.mark.parametrize("run", STUDY["runs"])
def test_every_cell_of_every_run_is_a_configuration(run: str) -> None:
    extra = ["dataset.path=data", "teacher.visual.checkpoint=weights.pth"]
    cells = list(study.run_cells(STUDY, run))
    config = study.run_config(STUDY, run, cells, STUDY["seeds"], extra)
    assert set(config.methods) == set(cells)
    assert config.name == run
    teacher, student = run.split("_")[:2]
    assert (config.teacher.visual.model, config.student.model) == (teacher, student)
    assert study.teacher_model(STUDY, run) == teacher
    views = {
        name: config.taught_views(method) for name, method in config.methods.items() if method.teacher != "none"
    }
    expected = {
        "kd_plain": ("original",),
        "lgd": ("original",),
        "kd_mirror": ("original", "mirror"),
        "tmkd": ("original", "edge", "high_frequency"),
        "kd_fused": ("original", "edge", "high_frequency"),
        "lgd_fused": ("original", "edge", "high_frequency"),
    }
    assert {name: views[name] for name in views.keys() & expected.keys()} == {
        name: expected[name] for name in views.keys() & expected.keys()
    }
    mirror = config.methods.get("kd_mirror")
    assert mirror is None or mirror.weighting == "uniform"


def test_the_claims_are_about_cells_of_the_study() -> None:
    cells = {cell for run in STUDY["runs"] for cell in study.run_cells(STUDY, run)}
    compared = [(ours, theirs) for ours, theirs, _ in tables.CLAIMS]
    compared += [(ours, theirs) for ours, _, theirs, _, _ in tables.PROBE_CLAIMS]
    for both in compared:
        assert set(both) <= cells


def record(cell: str, seed: int, accuracy: float) -> dict[str, object]:
    return {
        "run": "a_b_short",
        "store": "one",
        "cell": cell,
        "seed": seed,
        "teacher": "a",
        "student": "b",
        "parameters": 1234,
        "epochs": 5,
        "images_per_epoch": 1000,
        "validation_accuracy": accuracy + 0.01,
        "test_accuracy": accuracy,
        "test_images": 10000,
        "best_epoch": 5,
        "seconds": 10.0,
        "num_workers": 1,
        "device": "cpu",
        "hardware": "a processor",
        "finished": "2026-01-01T00:00:00Z",
        "taught_views": [] if cell == "alone" else ["original", "edge"],
    }


def test_tables_are_made_from_records_alone(tmp_path: Path) -> None:
    accuracies = {"alone": [0.2, 0.21, 0.22], "kd_plain": [0.25, 0.27, 0.23], "tmkd": [0.27, 0.3, 0.25]}
    folder = tmp_path / "runs" / "a_b_short" / "cells"
    folder.mkdir(parents=True)
    for cell, values in accuracies.items():
        for seed, value in enumerate(values):
            (folder / f"{cell}-seed{seed}.json").write_text(json.dumps(record(cell, seed, value)))
    tables.write_tables(tmp_path / "runs", tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results" / "a_b_short.csv").read_text())))
    assert len(rows) == 9
    assert {row["cell"] for row in rows} == set(accuracies)
    text = (tmp_path / "RESULTS.md").read_text()
    difference = 100 * (np.array(accuracies["tmkd"]) - np.array(accuracies["kd_plain"]))
    half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / np.sqrt(3)
    assert f"+{difference.mean():.2f} ± {half:.2f}" in text
    assert "| `kd_plain` | 3 | 26.00 ± 2.00 | 25.00 ± 2.00 | 2.0 |" in text
    assert difference.mean() > half
    assert "borne out" in text
    assert "Linear probes" not in text
    passes = tables.online_passes([record("tmkd", 0, 0.1), record("alone", 0, 0.1)])
    assert passes == 5 * 1000 * 2


def test_another_machine_goes_on_from_the_results(tmp_path: Path) -> None:
    """What is finished is in the results' folder; newer records of the run's folder take its place."""
    there, here = tmp_path / "there", tmp_path / "here"
    for folder, seed, accuracy in ((there, 0, 0.2), (there, 1, 0.3), (here, 1, 0.4)):
        cells = folder / "a_b_short" / "cells"
        cells.mkdir(parents=True, exist_ok=True)
        (cells / f"lgd-seed{seed}.json").write_text(json.dumps(record("lgd", seed, accuracy)))
    tables.write_tables(there, tmp_path)
    tables.write_tables(here, tmp_path)
    found = tables.gather(tmp_path / "nothing", tmp_path)["a_b_short"]
    assert {seed: each["test_accuracy"] for (_, seed), each in found.cells.items()} == {0: 0.2, 1: 0.4}

    other = record("lgd", 2, 0.5) | {"store": "two"}
    (here / "a_b_short" / "cells" / "lgd-seed2.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="taught by different stores \\(one, two\\)"):
        tables.gather(here, tmp_path)


def test_probes_of_pretrainings_have_a_table_and_claims(tmp_path: Path) -> None:
    cells = tmp_path / "runs" / "a_b_short" / "cells"
    cells.mkdir(parents=True)
    for cell, gain in (("lgd", 0.05), ("embedding_mse", 0.0)):
        for seed in range(3):
            probes = {
                "linear_10": 0.1 + gain,
                "linear_100": 0.2 + gain + 0.01 * seed,
                "random_linear_10": 0.05,
                "random_linear_100": 0.1,
            }
            (cells / f"{cell}-seed{seed}.json").write_text(json.dumps(record(cell, seed, 0.3) | probes))
    tables.write_tables(tmp_path / "runs", tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| `lgd` | 15.00 ± 0.00 | 26.00 ± 1.00 | 5.00 ± 0.00 | 10.00 ± 0.00 |" in text
    assert "LGD against random weights, linear probe | `lgd` − random | +16.00 ±" in text


def test_a_claim_needs_more_than_one_seed_and_clears_zero() -> None:
    def words(ours: dict[int, float], theirs: dict[int, float]) -> tuple[int, str]:
        found = tables.paired(ours, theirs)
        assert found is not None
        return found[1], tables.VERDICTS[found[0].verdict]

    assert tables.paired({0: 0.5}, {1: 0.5}) is None
    number, said = words({0: 0.5, 3: 0.9}, {0: 0.4})
    assert number == 1
    assert said.startswith("one seed")
    assert words({0: 0.5, 1: 0.4}, {0: 0.4, 1: 0.45})[1].startswith("not shown")
    assert words({0: 0.1, 1: 0.11, 2: 0.1}, {0: 0.4, 1: 0.41, 2: 0.41})[1].startswith("refuted")

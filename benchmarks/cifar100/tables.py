"""From the cells' records to `results/*` and `RESULTS.md`: generated, never typed."""

import csv
import io
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmkd_ray.errors import UserError
from tmkd_ray.report.comparison import Difference, seeded_difference

Record = dict[str, Any]

COLUMNS = (
    "run",
    "cell",
    "seed",
    "teacher",
    "student",
    "parameters",
    "epochs",
    "images_per_epoch",
    "validation_accuracy",
    "test_accuracy",
    "test_images",
    "linear_10",
    "linear_100",
    "random_linear_10",
    "random_linear_100",
    "best_epoch",
    "seconds",
    "num_workers",
    "device",
    "hardware",
    "finished",
)

CLAIMS = (
    ("kd_fused", "kd_plain", "Fused teacher against plain teacher, KD"),
    ("kd_fused", "kd_mirror", "Fused teacher against the plain one averaged over image and mirror, KD"),
    ("dkd_fused", "dkd_plain", "Fused teacher against plain teacher, DKD"),
    ("dkd_fused", "dkd_mirror", "Fused teacher against the plain one averaged over image and mirror, DKD"),
    (
        "kd_standardized_fused",
        "kd_standardized_plain",
        "Fused teacher against plain teacher, KD with logit standardisation",
    ),
    (
        "kd_standardized_fused",
        "kd_standardized_mirror",
        "Fused teacher against the plain one averaged over image and mirror, KD with logit standardisation",
    ),
    ("tmkd", "kd_plain", "All of TMKD against KD from the plain teacher"),
    ("tmkd", "kd_mirror", "All of TMKD against KD from the plain teacher averaged over image and mirror"),
    ("kd_plain", "alone", "KD from the plain teacher against the student alone"),
    ("kd_mirror", "kd_plain", "Averaging the plain teacher over image and mirror, KD"),
    ("tmkd", "tmkd_uniform", "Semantic weights against uniform ones, TMKD"),
    ("tmkd", "tmkd_no_views", "The views, TMKD"),
    ("tmkd", "tmkd_edge_only", "The high-frequency view beside the edge view, TMKD"),
    ("tmkd", "tmkd_high_frequency_only", "The edge view beside the high-frequency view, TMKD"),
    ("tmkd", "tmkd_no_text", "The text teacher's term, TMKD"),
    ("tmkd", "tmkd_no_contrastive", "The contrastive term, TMKD"),
    ("lgd", "embedding_mse", "LGD against plain embedding distillation by MSE, zero-shot"),
    ("lgd", "embedding_cosine", "LGD against plain embedding distillation by cosine, zero-shot"),
    ("lgd", "seed", "LGD against SEED, zero-shot"),
    ("lgd_fused", "lgd", "LGD on the fused embedding against LGD on the plain one, zero-shot"),
)
"""What is claimed to be better, than what, and in words; by test accuracy."""

PROBE_CLAIMS = (
    ("lgd", "linear_100", "lgd", "random_linear_100", "LGD against random weights, linear probe"),
    ("lgd", "linear_100", "embedding_mse", "linear_100", "LGD against embedding MSE, linear probe"),
    ("lgd", "linear_10", "embedding_mse", "linear_10", "The same, a tenth of the labels"),
    ("lgd", "linear_100", "seed", "linear_100", "LGD against SEED, linear probe"),
    ("lgd_fused", "linear_100", "lgd", "linear_100", "LGD on the fused embedding, linear probe"),
)
"""The same by linear probes: (cell, column) against (cell, column)."""


VERDICTS = {
    "better": "borne out",
    "worse": "refuted: it is worse",
    "within noise": "not shown: the interval holds zero",
    "noise unknown": "one seed, or no scatter: no interval",
}


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[Difference, int] | None:
    """Compare the seeds that both have; return the difference and their number, None where there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    both = ({seed: accuracies[seed] for seed in seeds} for accuracies in (ours, theirs))
    return seeded_difference(*both), len(seeds)


@dataclass
class Results:
    """What is finished of a run.

    Attributes:
        teachers: the record of its teachers; None where they were not measured yet.
        cells: records by cell and seed.
    """

    teachers: Record | None = None
    cells: dict[tuple[str, int], Record] = field(default_factory=dict)

    def records(self) -> list[Record]:
        """Return the cells' records in the order they were trained."""
        return sorted(
            self.cells.values(), key=lambda record: (record["finished"], record["cell"], record["seed"])
        )


def gather(output: Path, results: Path) -> dict[str, Results]:
    """Return what is finished, by run: from `results/results/RUN.json` and, newer, from the runs' own folders.

    Raises:
        UserError: the two hold cells that were taught by different stores, which no table may compare.
    """
    runs: dict[str, Results] = {}
    for file in (results / "results").glob("*.json"):
        content = json.loads(file.read_text())
        cells = {(record["cell"], record["seed"]): record for record in content["cells"]}
        runs[file.stem] = Results(content["teachers"], cells)
    for file in output.glob("*/teachers.json"):
        runs.setdefault(file.parent.name, Results()).teachers = json.loads(file.read_text())
    for file in output.glob("*/cells/*.json"):
        record = json.loads(file.read_text())
        found = runs.setdefault(file.parent.parent.name, Results())
        found.cells[record["cell"], record["seed"]] = record
    for run, found in runs.items():
        stores = {record["store"] for record in [*found.cells.values(), found.teachers] if record is not None}
        if len(stores) > 1:
            raise UserError(
                f"{run}: its cells in {results / 'results'} and in {output} were taught by different stores "
                f"({', '.join(sorted(stores))}), which no table may compare; give other folders by --output "
                "and --results, or remove those of one store"
            )
    return dict(sorted(runs.items()))


def results_csv(records: list[Record]) -> str:
    """Return one row a cell and seed."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def mean_std(values: list[float]) -> str:
    mean = 100 * statistics.fmean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {100 * statistics.stdev(values):.2f}"


def percentages(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in values.items())


def run_section(run: str, teacher: Record | None, records: list[Record]) -> list[str]:
    """Return the lines of a run: its recipe, its teachers, its cells, and what the claims come to."""
    first = records[0]
    labels = f"{first['images_per_epoch']:,} labelled images"
    lines = [
        f"## {run}",
        "",
        f"{first['teacher']} → {first['student']} ({first['parameters']:,} parameters), {first['epochs']} "
        f"epochs of {labels}; {first['test_images']:,} test images; workers: {first['num_workers']}, on "
        f"{first['hardware']}.",
        "",
    ]
    if teacher is not None:
        found = teacher["validation"]
        lines += [
            f"Teacher ({teacher['source']}): {100 * teacher['test_accuracy']:.2f} % on test. On "
            f"{teacher['validation_images']:,} validation images, in %: by view {percentages(found['views'])}."
        ]
        for name, fused in found["fused"].items():
            if name in ("tmkd", "kd_mirror", "kd_fused", "lgd_fused"):
                lines.append(f"Fused as in `{name}`: {percentages(fused)}.")
        if found.get("zero_shot"):
            lines.append(f"CLIP zero-shot: {percentages(found['zero_shot'])}.")
        lines += [
            f"One store: {teacher['teacher_passes']:,} teacher passes in {teacher['knowledge_seconds']:.0f} s, "
            f"{teacher['store_bytes'] / 1e6:.0f} MB. The same cells with the teachers online would have passed "
            f"{online_passes(records):,} images through them.",
            "",
        ]
    by_cell: dict[str, list[Record]] = {}
    for record in records:
        by_cell.setdefault(record["cell"], []).append(record)
    lines += ["| cell | seeds | validation, % | test, % | s an epoch |", "|---|---:|---:|---:|---:|"]
    for cell, runs in by_cell.items():
        seconds = statistics.median(each["seconds"] / each["epochs"] for each in runs)
        validation = mean_std([each["validation_accuracy"] for each in runs])
        test = mean_std([each["test_accuracy"] for each in runs])
        lines.append(f"| `{cell}` | {len(runs)} | {validation} | {test} | {seconds:.1f} |")
    lines += probe_table(by_cell)

    def by_seed(cell: str, column: str) -> dict[int, float]:
        return {each["seed"]: each[column] for each in by_cell.get(cell, ()) if column in each}

    claims = [
        *((text, ours, theirs, "test_accuracy", "test_accuracy") for ours, theirs, text in CLAIMS),
        *((text, ours, theirs, mine, other) for ours, mine, theirs, other, text in PROBE_CLAIMS),
    ]
    rows = []
    for text, ours, theirs, mine, other in claims:
        found = paired(by_seed(ours, mine), by_seed(theirs, other))
        if found is not None:
            difference, seeds = found
            words = VERDICTS[difference.verdict]
            cells = f"`{ours}` − `{theirs}`" if ours != theirs else f"`{ours}` − random"
            rows.append(f"| {text} | {cells} | {difference.in_points()} | {seeds} | {words} |")
    if rows:
        lines += [
            "",
            "| claim | cells | difference on test, points | seeds | |",
            "|---|---|---:|---:|---|",
            *rows,
        ]
    return [*lines, ""]


def probe_table(by_cell: dict[str, list[Record]]) -> list[str]:
    """Return the lines of the linear probes' table; none where there is no pre-training."""
    probed = {cell: runs for cell, runs in by_cell.items() if "linear_100" in runs[0]}
    if not probed:
        return []
    lines = [
        "",
        "Linear probes on frozen features, test accuracy in %:",
        "",
        "| cell | 10 % of labels | all labels | random weights, 10 % | random weights, all |",
        "|---|---:|---:|---:|---:|",
    ]
    columns = ("linear_10", "linear_100", "random_linear_10", "random_linear_100")
    for cell, runs in probed.items():
        figures = [mean_std([each[column] for each in runs]) for column in columns]
        lines.append(f"| `{cell}` | {' | '.join(figures)} |")
    return lines


def online_passes(records: list[Record]) -> int:
    """Return how many image views the teachers would have seen, had they run beside each training."""
    passes = 0
    for record in records:
        passes += record["epochs"] * record["images_per_epoch"] * len(record["taught_views"])
    return passes


def results_markdown(runs: dict[str, Results]) -> str:
    lines = [
        "# CIFAR-100: what TMKD brings",
        "",
        "Generated by `study.py` from the records of finished cells; do not edit. Accuracy in %, mean ± "
        "sample standard deviation over the seeds. Differences are paired by seed (same initial weights, same "
        "labelled images), ± the half-width of the 95 % interval (Student's t). Validation chose the epoch; "
        "test was read once a cell and seed. `mirror`: the plain teacher averaged over the image and its "
        "mirror. A given teacher that was trained on all of train has seen the validation images, so its "
        "figures on them flatter it. `lgd`, `embedding` and `seed` learn without labels: their accuracy is "
        "zero-shot, and linear probes on their frozen features stand beside it. Seconds are of machines that "
        "may have had other work.",
        "",
    ]
    for run, results in runs.items():
        if results.cells:
            lines += run_section(run, results.teachers, results.records())
    return "\n".join(lines)


def write_tables(output: Path, results: Path) -> None:
    """Write `results/RUN.json` and `.csv` for every run that has records, and `RESULTS.md`."""
    runs = gather(output, results)
    (results / "results").mkdir(parents=True, exist_ok=True)
    for run, found in runs.items():
        records = found.records()
        content = {"teachers": found.teachers, "cells": records}
        (results / "results" / f"{run}.json").write_text(json.dumps(content, indent=1) + "\n")
        (results / "results" / f"{run}.csv").write_text(results_csv(records))
    (results / "RESULTS.md").write_text(results_markdown(runs))

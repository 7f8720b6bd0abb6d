"""From the cells' records to `results/*.csv` and `RESULTS.md`: generated, never typed."""

import csv
import io
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

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
)
"""What is claimed to be better, than what, and in words."""


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


def read_records(output: Path) -> tuple[dict[str, Record], dict[str, list[Record]]]:
    """Return the teachers' records by run, and the cells' records by run, in the order they were trained."""
    teachers = {
        file.parent.name: json.loads(file.read_text()) for file in sorted(output.glob("*/teachers.json"))
    }
    cells: dict[str, list[Record]] = defaultdict(list)
    for file in output.glob("*/cells/*.json"):
        cells[file.parent.parent.name].append(json.loads(file.read_text()))
    for records in cells.values():
        records.sort(key=lambda record: (record["finished"], record["cell"], record["seed"]))
    return teachers, dict(sorted(cells.items()))


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
            if name in ("tmkd", "kd_mirror", "kd_fused"):
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
    test_by_cell = {
        cell: {each["seed"]: each["test_accuracy"] for each in runs} for cell, runs in by_cell.items()
    }
    claims = [
        (text, ours, theirs, paired(test_by_cell[ours], test_by_cell[theirs]))
        for ours, theirs, text in CLAIMS
        if ours in test_by_cell and theirs in test_by_cell
    ]
    if claims:
        lines += ["", "| claim | cells | difference on test, points | seeds | |", "|---|---|---:|---:|---|"]
        for text, ours, theirs, found in claims:
            if found is not None:
                difference, seeds = found
                words = VERDICTS[difference.verdict]
                cells = f"`{ours}` − `{theirs}`"
                lines.append(f"| {text} | {cells} | {difference.in_points()} | {seeds} | {words} |")
    return [*lines, ""]


def online_passes(records: list[Record]) -> int:
    """Return how many image views the teachers would have seen, had they run beside each training."""
    passes = 0
    for record in records:
        (distiller,) = record["config"]["methods"].values()
        if distiller["teacher"] != "none":
            views = distiller["views"] or list(record["config"]["views"])
            num_views = 1 if distiller["teacher"] == "plain" else len(views)
            passes += record["epochs"] * record["images_per_epoch"] * num_views
    return passes


def results_markdown(teachers: dict[str, Record], cells: dict[str, list[Record]]) -> str:
    lines = [
        "# CIFAR-100: what TMKD brings",
        "",
        "Generated by `study.py` from the records of finished cells; do not edit. Accuracy in %, mean ± "
        "sample standard deviation over the seeds. Differences are paired by seed (same initial weights, same "
        "labelled images), ± the half-width of the 95 % interval (Student's t). Validation chose the epoch; "
        "test was read once a cell and seed. `mirror`: the plain teacher averaged over the image and its "
        "mirror. A given teacher that was trained on all of train has seen the validation images, so its "
        "figures on them flatter it. `lgd` learns without labels and is measured zero-shot. Seconds are of "
        "machines that may have had other work.",
        "",
    ]
    for run, records in cells.items():
        lines += run_section(run, teachers.get(run), records)
    return "\n".join(lines)


def write_tables(output: Path, results: Path) -> None:
    """Write `results/RUN.csv` for every run that has records, and `RESULTS.md`."""
    teachers, cells = read_records(output)
    (results / "results").mkdir(parents=True, exist_ok=True)
    for run, records in cells.items():
        (results / "results" / f"{run}.csv").write_text(results_csv(records))
    (results / "RESULTS.md").write_text(results_markdown(teachers, cells))

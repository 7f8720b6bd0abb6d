"""The study of what TMKD brings on CIFAR-100: every cell of `study.yaml`, with every seed.

    python benchmarks/cifar100/study.py --data PARQUET_FOLDER [--teacher resnet56=WEIGHTS] [--clip FOLDER]
        [--only RUN,…] [--cells CELL,…] [--seeds 0,…] [--output runs/cifar100] [path=value …]

What is finished is kept: the same command goes on after an interruption. Each cell and seed leaves a JSON
file in the run's folder; test images are read once, when that file is made. `results/RUN.json` gathers these
records, so that another machine goes on where this one stopped; `results/*.csv` and `RESULTS.md` are generated
from it, and from nothing else.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import hardware
from tables import Record, Results, gather, write_tables

from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config.transfer import LinearConfig
from tmkd_ray.config_reading import apply_override, parse_yaml, resolve
from tmkd_ray.downstream.opened import RANDOM, STUDENT
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.quality import measure_quality
from tmkd_ray.pretraining import PretrainingConfig
from tmkd_ray.stages.distillation import TrainedStudent, distill
from tmkd_ray.stages.evaluation import Networks, clip_networks, measure, student_network, teacher_network
from tmkd_ray.stages.experiment import open_experiment
from tmkd_ray.stages.fitting import fit_clip, fit_teacher
from tmkd_ray.stages.knowledge import KnowledgeResult, compute_knowledge
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.session import ray_session
from tmkd_ray.stages.transfer import transfer

HERE = Path(__file__).parent


def flat(overrides: list[Any]) -> Iterator[str]:
    """Yield the overrides of a list that may hold lists."""
    for override in overrides:
        if isinstance(override, list):
            yield from flat(override)
        else:
            yield override


def read_study(path: Path) -> dict[str, Any]:
    study = parse_yaml(path.read_text(), str(path))
    assert isinstance(study, dict)
    return study


def run_cells(study: dict[str, Any], run: str) -> dict[str, Any]:
    """Return the cells of a run, by name: the study's, or its own where it is a mapping."""
    of_run = study["runs"][run]
    cells: dict[str, Any] = of_run["cells"] if isinstance(of_run, dict) else study["cells"]
    return cells


def run_overrides(study: dict[str, Any], run: str) -> list[str]:
    of_run = study["runs"][run]
    return list(flat(of_run["overrides"] if isinstance(of_run, dict) else of_run))


def run_config(
    study: dict[str, Any], run: str, cells: list[str], seeds: list[int], extra: list[str]
) -> ExperimentConfig:
    """Return the configuration of some cells of a run."""
    tree = copy.deepcopy(study["experiment"])
    methods = {cell: run_cells(study, run)[cell] for cell in cells}
    tree |= {"name": run, "seeds": seeds, "methods": methods}
    for override in [*run_overrides(study, run), *extra]:
        apply_override(tree, override)
    return resolve(tree, f"{run} of the study")


def teacher_model(study: dict[str, Any], run: str) -> str:
    """Return the visual teacher of a run."""
    models = [
        value
        for path, _, value in (override.partition("=") for override in run_overrides(study, run))
        if path == "teacher.visual.model"
    ]
    return models[-1]


def go(config: ExperimentConfig, folder: Path, done: Results) -> None:
    """Compute what is missing of a run: the teachers' figures, then cell by cell, seed by seed.

    Args:
        done: what was finished before, here or elsewhere.

    Raises:
        UserError: what was finished before was taught by other teachers than those of this configuration.
    """
    missing = [
        (cell, seed) for seed in config.seeds or () for cell in config.methods if (cell, seed) not in done.cells
    ]
    if done.teachers is not None and not missing:
        return
    experiment = open_experiment(config)
    experiment.save_config()
    teacher, clip = fit_teacher(experiment), fit_clip(experiment)
    knowledge = compute_knowledge(experiment, teacher, clip)
    store = knowledge.manifest.fingerprint
    if done.teachers is None:
        networks = Networks(teacher_network(experiment, teacher), ())
        others = () if clip is None else tuple(clip_networks(experiment, clip))
        test = measure(experiment, Networks(networks.teacher, others), "test")
        assert test.teacher is not None
        manifest = knowledge.manifest
        variants = config.knowledge.num_variants * manifest.rows("train") + manifest.rows("validation")
        write_json(
            folder / "teachers.json",
            {
                "run": config.name,
                "store": store,
                "teacher": config.teacher.visual.model,
                "source": teacher.source,
                "test_images": test.num_images,
                "test_accuracy": test.teacher.metrics.accuracy,
                "zero_shot_test_accuracy": {each.name: each.metrics.accuracy for each in test.others},
                "validation": quality(config, knowledge),
                "validation_images": manifest.rows("validation"),
                "teacher_passes": variants * len(config.views),
                "store_bytes": manifest.total_bytes(),
                "knowledge_seconds": knowledge.seconds,
                "hardware": hardware(),
                "config": config.model_dump(mode="json"),
            },
        )
    elif done.teachers["store"] != store:
        raise UserError(
            f"{config.name}: the cells in its results were taught by other teachers, views or variants (store "
            f"{done.teachers['store']}) than this configuration has (store {store}); give those, or other "
            "folders by --output and --results"
        )
    for cell, seed in missing:
        distiller = config.methods[cell]
        one = config.model_copy(update={"methods": {cell: distiller}, "seeds": (seed,)})
        part = open_experiment(one)
        (student,) = distill(part)
        test = measure(part, Networks(None, (student_network(part, student),)), "test")
        outcome = student.outcome
        record: Record = {
            "run": config.name,
            "store": store,
            "cell": cell,
            "seed": seed,
            "teacher": config.teacher.visual.model,
            "student": config.student.model,
            "parameters": outcome.parameters,
            "epochs": one.training.epochs,
            "images_per_epoch": num_images(one, knowledge),
            "validation_accuracy": outcome.validation_accuracy,
            "test_accuracy": test.others[0].metrics.accuracy,
            "test_images": test.num_images,
            "best_epoch": outcome.best_epoch,
            "seconds": outcome.seconds,
            "num_workers": outcome.num_workers,
            "device": outcome.device,
            "hardware": hardware(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": distiller.model_dump(mode="json"),
            "taught_views": one.taught_views(distiller) if distiller.teacher != "none" else (),
        }
        if isinstance(distiller, PretrainingConfig):
            record |= linear_probes(one, student)
        write_json(folder / "cells" / f"{cell}-seed{seed}.json", record)
        accuracy = 100 * test.others[0].metrics.accuracy
        say(f"study: {config.name}, {cell}, seed {seed}: test {accuracy:.2f} %")


def linear_probes(config: ExperimentConfig, student: TrainedStudent) -> Record:
    """Return the test accuracies of linear probes on a pre-trained encoder, and on the same one from random
    weights, with a tenth of the labels and with all of them.
    """
    probe = LinearConfig(
        name=f"probe-{student.method}-seed{student.seed}",
        output=str(Path(config.output) / config.name),
        student=student.path,
        model=config.student.model,
        mean=config.dataset.mean,
        std=config.dataset.std,
        dataset=config.dataset,
        fractions=(0.1, 1.0),
        num_workers=config.training.num_workers,
        seed=student.seed,
        cluster=config.cluster,
    )
    rows = {str(row["backbone"]): row for row in transfer(probe).rows}
    return {
        f"{name}_{part}": rows[backbone][column]
        for name, backbone in (("linear", STUDENT), ("random_linear", RANDOM))
        for part, column in (("10", "10 % of labels"), ("100", "100 % of labels"))
    }


def num_images(config: ExperimentConfig, knowledge: KnowledgeResult) -> int:
    """Return how many training images a student sees in an epoch."""
    labels = config.training.labels_per_class
    manifest = knowledge.manifest
    return manifest.rows("train") if labels is None else labels * len(manifest.class_names)


def quality(config: ExperimentConfig, knowledge: KnowledgeResult) -> dict[str, Any]:
    """Return how right the teacher is on the validation images: each view, and fusions of them."""
    arrays = knowledge.store.read("validation", with_images=False)
    found: dict[str, Any] = {"views": {}, "fused": {}}
    for name, distiller in config.methods.items():
        if distiller.teacher != "fused":
            continue
        of_cell = measure_quality(
            arrays,
            knowledge.constants(),
            distiller.weighting,
            distiller.fusion_temperature,
            distiller.clip_temperature,
            config.taught_views(distiller),
        )
        found["views"] |= of_cell.views
        found["fused"][name] = of_cell.fused
        found["zero_shot"] = of_cell.zero_shot
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.rename(path)


def listed(text: str) -> list[str]:
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--data", help="CIFAR-100 in Parquet")
    parser.add_argument(
        "--teacher", action="append", default=[], metavar="MODEL=WEIGHTS", help="else fitted here"
    )
    parser.add_argument("--clip", metavar="FOLDER", help="a CLIP by save_pretrained; else fitted here")
    parser.add_argument("--only", type=listed, metavar="RUN,…", help="these runs; else all")
    parser.add_argument("--cells", type=listed, metavar="CELL,…", help="these cells; else all")
    parser.add_argument("--seeds", type=listed, metavar="0,…", help="these seeds; else the study's")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar100"))
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results/ and RESULTS.md")
    parser.add_argument("--tables-only", action="store_true", help="from what is there; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="of every configuration")
    options = parser.parse_intermixed_args()
    study = read_study(options.study)
    weights = dict(each.split("=", 1) for each in options.teacher)
    runs = options.only or list(study["runs"])
    try:
        if not options.tables_only:
            for run in runs:
                extra = [f"output={options.output.absolute()}", *options.overrides]
                if options.data is not None:
                    extra.append(f"dataset.path={options.data}")
                if options.clip is not None:
                    extra.append(f"teacher.text.model={options.clip}")
                cells = options.cells or list(run_cells(study, run))
                seeds = [int(seed) for seed in options.seeds or study["seeds"]]
                weight = weights.get(teacher_model(study, run))
                if weight is not None:
                    extra.append(f"teacher.visual.checkpoint={weight}")
                config = run_config(study, run, cells, seeds, extra)
                done = gather(options.output, options.results).get(run, Results())
                with ray_session(config):
                    go(config, options.output / run, done)
        write_tables(options.output, options.results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Find a trained student on disk: in a run's folder, in its own, or as an exported safetensors file."""

import json
import os
import platform
import re
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from tmkd_ray import __version__, storage
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import parse_yaml, resolve
from tmkd_ray.datasets import build_dataset
from tmkd_ray.errors import UserError
from tmkd_ray.export.base import Student, StudentNetwork
from tmkd_ray.export.record import ExportRecord
from tmkd_ray.export.weights import read_safetensors_record, run_with_weights
from tmkd_ray.models import build_model, count_parameters, load_checkpoint
from tmkd_ray.results import MethodRecord, RunResults
from tmkd_ray.types import TaskSpec

_STUDENT_FOLDER = re.compile(r"(?P<method>.+)-seed(?P<seed>\d+)-(?P<key>[0-9a-f]{12})")
_WEIGHTS = "model.safetensors"
_PROJECTOR = "projector.safetensors"
"""Lies beside a student that was trained without labels: its classifier means nothing."""


@dataclass(frozen=True)
class FoundStudent:
    """A student, and the experiment that trained it.

    Attributes:
        path: of its weights.
        config: None for an exported file, which is all there is.
        folder: of the run, None likewise.
    """

    student: Student
    path: str
    config: ExperimentConfig | None
    folder: str | None

    @property
    def name(self) -> str:
        """Short, for files and tables: method and seed, or the file's own name."""
        record = self.student.record
        if record.method is None:
            return os.path.splitext(os.path.basename(self.path))[0]
        return f"{record.method}-seed{record.seed}"


def find_student(path: str, method: str | None = None, seed: int | None = None) -> FoundStudent:
    """Load a student.

    Args:
        path: a run's folder; a student's folder in it, or the weights therein; or an exported .safetensors.
        method: in a run's folder; None: the only one, or that of the configuration's `distiller`.
        seed: in a run's folder; None: the lowest.

    Raises:
        UserError: there is none, or several fit.
    """
    path = storage.absolute(path).rstrip("/")
    if not storage.is_folder(path):
        if not path.endswith(".safetensors") or not storage.exists(path):
            raise UserError(
                f"{path} is neither a run's folder nor a student's weights (.safetensors); a run's folder is "
                "output/name of its configuration and holds config.yaml"
            )
        with storage.local_copy(path) as local:
            record = read_safetensors_record(local)
            if record is not None:
                return _exported(record, safetensors.torch.load_file(local), path)
        return _of_run(os.path.dirname(path), os.path.basename(path))
    if storage.exists(storage.join(path, "config.yaml")):
        return _of_run(choose_student(path, method, seed))
    if storage.exists(storage.join(path, "outcome.json")):
        return _of_run(path)
    raise UserError(f"{path} is no run's folder: it holds no config.yaml. Give output/name of a configuration")


def choose_student(folder: str, method: str | None, seed: int | None) -> str:
    """Return the folder of a run's finished student; arguments and errors as for `find_student`."""
    found = []
    students = storage.join(folder, "students")
    for name in storage.list_names(students):
        match = _STUDENT_FOLDER.fullmatch(name)
        if match and storage.exists(storage.join(students, name, "outcome.json")):
            found.append((match["method"], int(match["seed"]), storage.join(students, name)))
    if not found:
        raise UserError(f"{folder} holds no finished student; `tmkd run` or `tmkd distill` trains them")
    methods = sorted({name for name, _, _ in found})
    if method is None:
        preferred = read_run_config(folder).distiller.name
        method = methods[0] if len(methods) == 1 else preferred
        if method not in methods:
            raise UserError(f"{folder} holds several students; say --method {' or '.join(methods)}")
    seeds = sorted({number for name, number, _ in found if name == method})
    if not seeds:
        raise UserError(f"{folder} holds no student of the method {method!r}; there are: {', '.join(methods)}")
    seed = seeds[0] if seed is None else seed
    fitting = [path for name, number, path in found if (name, number) == (method, seed)]
    if not fitting:
        raise UserError(
            f"{folder} holds no student of {method} with seed {seed}; seeds: {', '.join(map(str, seeds))}"
        )
    if len(fitting) > 1:
        fitting = [path for path in fitting if _measured(folder, method, seed, _outcome(path))] or fitting
    if len(fitting) > 1:
        listing = "\n".join(f"  {path}" for path in fitting)
        raise UserError(f"several students of {method} seed {seed}; give the folder of one:\n{listing}")
    return fitting[0]


def read_run_config(folder: str) -> ExperimentConfig:
    """Return the configuration that a run saved.

    Raises:
        UserError: it is missing or does not fit this version.
    """
    path = storage.join(folder, "config.yaml")
    tree = parse_yaml(storage.read_bytes(path).decode("utf-8", "replace"), path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no saved configuration")
    return resolve(tree, path)


def read_run_results(folder: str) -> RunResults | None:
    """Return what a run measured; None if it was not finished."""
    path = storage.join(folder, "results.json")
    return RunResults.load(path) if storage.exists(path) else None


def class_names_of(folder: str, config: ExperimentConfig) -> tuple[str, ...]:
    """Return the class names of a run's data: from its results, else from the data."""
    results = read_run_results(folder)
    if results is not None:
        return tuple(results.dataset.class_names)
    return build_dataset(config.dataset).class_names


def versions() -> dict[str, str]:
    """Return the versions of what writes the file."""
    return {"tmkd-ray": __version__, "python": platform.python_version(), "torch": torch.__version__}


def _of_run(folder: str, weights: str = _WEIGHTS) -> FoundStudent:
    """Load the student in a folder `RUN/students/METHOD-seedSEED-KEY`."""
    run = os.path.dirname(os.path.dirname(folder))
    match = _STUDENT_FOLDER.fullmatch(os.path.basename(folder))
    path = storage.join(folder, weights)
    if match is None or not storage.exists(storage.join(run, "config.yaml")):
        raise UserError(
            f"{path} holds weights alone, and lies in no run's folder that would say of which model, classes "
            "and normalisation. Give the run's folder, or a file that `tmkd export --format safetensors` wrote"
        )
    config = read_run_config(run)
    task = TaskSpec(class_names_of(run, config), config.dataset.image_size)
    model = build_model(config.student.model, task)
    load_checkpoint(model, path)
    outcome = _outcome(folder)
    is_encoder = storage.exists(storage.join(folder, _PROJECTOR))
    if is_encoder:  # validated by CLIP's texts
        figures = {"zero_shot_validation_accuracy": float(outcome["validation_accuracy"])}
    else:
        figures = _figures(run, match["method"], int(match["seed"]), outcome)
    head = sum(parameter.numel() for parameter in model.head.parameters()) if is_encoder else 0
    record = ExportRecord(
        model=config.student.model,
        kind="encoder" if is_encoder else "classifier",
        class_names=() if is_encoder else task.class_names,
        feature_width=model.feature_width,
        image_size=task.image_size,
        mean=config.dataset.mean,
        std=config.dataset.std,
        parameters=count_parameters(model) - head,
        dataset=config.dataset.name,
        run=config.name,
        method=match["method"],
        seed=int(match["seed"]),
        best_epoch=outcome.get("best_epoch"),
        figures=figures,
        versions=versions(),
    )
    return FoundStudent(Student(model.eval().requires_grad_(False), record), path, config, run)


def _exported(record: ExportRecord, state: dict[str, torch.Tensor], path: str) -> FoundStudent:
    network = run_with_weights(record, state, path).network
    assert isinstance(network, StudentNetwork)
    return FoundStudent(Student(network.model, record), path, None, None)


def _outcome(folder: str) -> dict[str, Any]:
    path = storage.join(folder, "outcome.json")
    try:
        outcome = json.loads(storage.read_bytes(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); train the student again") from error
    if not isinstance(outcome, dict):
        raise UserError(f"{path} is damaged; train the student again")
    return outcome


def _measured(folder: str, method: str, seed: int, outcome: dict[str, Any]) -> dict[str, float]:
    """Return what the run's results say of this very training; nothing if they are of another."""
    results = read_run_results(folder)
    records: list[MethodRecord] = [] if results is None else results.methods
    for record in records:
        for run in record.runs:
            same = (run.seed, run.best_epoch, run.seconds, run.validation_accuracy) == (
                seed,
                outcome.get("best_epoch"),
                outcome.get("seconds"),
                outcome.get("validation_accuracy"),
            )
            if record.name == method and same:
                figures = {
                    "test_accuracy": run.test_accuracy,
                    "test_top5_accuracy": run.test_top5_accuracy,
                    "test_ece": run.test_ece,
                    "validation_accuracy": run.validation_accuracy,
                }
                return {name: value for name, value in figures.items() if value is not None}
    return {}


def _figures(folder: str, method: str, seed: int, outcome: dict[str, Any]) -> dict[str, float]:
    accuracy = outcome.get("validation_accuracy")
    known = {} if accuracy is None else {"validation_accuracy": float(accuracy)}
    return known | _measured(folder, method, seed, outcome)

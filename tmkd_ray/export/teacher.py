"""A run's visual teacher, to be measured beside its students."""

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.export.base import Student
from tmkd_ray.export.record import ExportRecord
from tmkd_ray.export.student import class_names_of, read_run_config, read_run_results, versions
from tmkd_ray.models import build_model, count_parameters, load_checkpoint
from tmkd_ray.models.view_batch_norm import use_view_statistics
from tmkd_ray.types import TaskSpec


def find_teacher(folder: str) -> Student:
    """Load the visual teacher of a run: the one that its configuration names, or that fitted or adapted there.

    Raises:
        UserError: it is no run's folder, or holds no teacher, or several.
    """
    folder = storage.absolute(folder).rstrip("/")
    if not storage.exists(storage.join(folder, "config.yaml")):
        raise UserError(f"--teacher {folder}: no run's folder, for it holds no config.yaml")
    config = read_run_config(folder)
    visual = config.teacher.visual
    path = visual.checkpoint
    if visual.is_fitted:
        found = [
            storage.join(folder, name, "model.safetensors")
            for name in storage.list_names(folder)
            if name.startswith("teacher-") and storage.exists(storage.join(folder, name, "outcome.json"))
        ]
        if len(found) != 1:
            raise UserError(f"--teacher {folder}: {len(found)} fitted visual teachers are there, expected one")
        path = found[0]
    task = TaskSpec(class_names_of(folder, config), config.dataset.image_size)
    model = build_model(visual.model, task)
    if visual.has_view_statistics:  # those of the first view serve where no view is told
        use_view_statistics(model, len(config.views))
    if path is not None:
        load_checkpoint(model, path)
    results = read_run_results(folder)
    measured = None if results is None else results.teacher
    figures: dict[str, float] = {}
    if measured is not None:
        figures["validation_accuracy"] = measured.validation_accuracy
        if measured.test_accuracy is not None:
            figures["test_accuracy"] = measured.test_accuracy
    record = ExportRecord(
        model=visual.model,
        class_names=task.class_names,
        feature_width=model.feature_width,
        image_size=task.image_size,
        mean=visual.mean or config.dataset.mean,
        std=visual.std or config.dataset.std,
        parameters=count_parameters(model),
        dataset=config.dataset.name,
        run=config.name,
        method="visual teacher",
        figures=figures,
        versions=versions(),
    )
    return Student(model.eval().requires_grad_(False), record)

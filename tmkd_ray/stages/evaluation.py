"""Measure trained networks on a split."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tmkd_ray.datasets.decode import LoadedImages, list_set_aside, load_images
from tmkd_ray.errors import UserError
from tmkd_ray.models import build_model, count_parameters, load_checkpoint
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.stages.distillation import TrainedStudent, found_students
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.fitting import Fitted, found_clip, found_teacher, load_teacher
from tmkd_ray.stages.progress import say
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.metrics import evaluate


@dataclass(frozen=True)
class Measured:
    """One network's figures on a split: accuracies 0 to 1, `loss` in nats (None: not a classifier's logits)."""

    name: str
    parameters: int
    accuracy: float
    top5_accuracy: float
    loss: float | None


def split_images(experiment: Experiment, split: str) -> LoadedImages:
    """Load the `test` or `validation` images; those set aside are said."""
    if split == "test":
        images = load_images(experiment.dataset, "test", experiment.dataset.index("test"))
    else:
        images = load_images(experiment.dataset, "train", experiment.validation)
    for line in list_set_aside(split, images.set_aside):
        say(line)
    return images


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure_classifier(
    name: str,
    model: torch.nn.Module,
    mean: ImageStatistics,
    std: ImageStatistics,
    images: LoadedImages,
    batch_size: int,
) -> Measured:
    device = _device()
    model = model.eval().to(device)
    normalize = Normalize(mean, std).to(device)

    def predict(batch_BHWC: Tensor) -> Tensor:
        logits_BC: Tensor = model(normalize(batch_BHWC)).logits
        return logits_BC

    metrics = evaluate(
        predict,
        torch.from_numpy(images.images),
        torch.from_numpy(images.labels),
        PlainContext(Path(), device, quiet=True),
        batch_size,
    )
    return Measured(
        name, count_parameters(model), metrics["accuracy"], metrics["top5_accuracy"], metrics["loss"]
    )


def measure_teacher(experiment: Experiment, teacher: Fitted, images: LoadedImages) -> Measured:
    """Measure the visual teacher on the images as they are."""
    visual = load_teacher(experiment, teacher)
    mean, std = experiment.teacher_statistics()
    config = experiment.config
    name = f"visual teacher {config.teacher.visual.model}"
    return _measure_classifier(name, visual.model, mean, std, images, config.training.evaluation_batch_size)


def measure_student(experiment: Experiment, student: TrainedStudent, images: LoadedImages) -> Measured:
    """Measure a trained student."""
    config = experiment.config
    model = build_model(config.student.model, experiment.task)
    load_checkpoint(model, student.path)
    name = f"{student.method} seed {student.seed}: {config.student.model}"
    mean, std = config.dataset.mean, config.dataset.std
    return _measure_classifier(name, model, mean, std, images, config.training.evaluation_batch_size)


def measure_clip(experiment: Experiment, clip_fitted: Fitted, images: LoadedImages) -> list[Measured]:
    """Measure CLIP's zero-shot accuracy on each view with its own prompts."""
    device = _device()
    clip = ClipTeacher.load(clip_fitted.path).to(device)
    prompts = experiment.prompts()
    bank_VCE = clip.text_bank(list(prompts.values()), experiment.task.class_names)
    results = []
    for (name, view), text_CE in zip(experiment.views().items(), bank_VCE, strict=True):

        def predict(batch_BHWC: Tensor, text_CE: Tensor = text_CE) -> Tensor:
            return clip.encode_images(batch_BHWC) @ text_CE.T / clip.temperature

        metrics = evaluate(
            predict,
            torch.from_numpy(view(images.images)),
            torch.from_numpy(images.labels),
            PlainContext(Path(), device, quiet=True),
            experiment.config.training.evaluation_batch_size,
        )
        parameters = sum(p.numel() for p in clip.parameters())
        results.append(
            Measured(
                f"CLIP zero-shot, {name}",
                parameters,
                metrics["accuracy"],
                metrics["top5_accuracy"],
                metrics["loss"],
            )
        )
    return results


def measure_all(experiment: Experiment, split: str) -> tuple[list[Measured], str, int]:
    """Measure every network of this configuration that is there.

    Returns:
        The figures, the split, and its number of images.

    Raises:
        UserError: there is none.
    """
    teacher, clip = found_teacher(experiment), found_clip(experiment)
    try:
        students = found_students(experiment)
    except UserError as error:  # a store without its CLIP, say: the teachers can be measured all the same
        say(f"students are left out: {error}")
        students = []
    if teacher is None and clip is None and not students:
        raise UserError(
            "nothing to evaluate yet: give teacher.visual.checkpoint, or run `tmkd fit-teacher` or `tmkd run`"
        )
    images = split_images(experiment, split)
    results = []
    if teacher is not None:
        results.append(measure_teacher(experiment, teacher, images))
    if clip is not None:
        results += measure_clip(experiment, clip, images)
    results += [measure_student(experiment, student, images) for student in students]
    return results, split, len(images.labels)


def format_measured(results: list[Measured], split: str, num_images: int) -> str:
    """Return a plain table of what was measured."""
    width = max(len(result.name) for result in results)
    lines = [
        f"{split} split, {num_images:,} images",
        f"{'':{width}}  {'params':>10}  {'top-1 %':>8}  {'top-5 %':>8}",
    ]
    for result in results:
        lines.append(
            f"{result.name:{width}}  {result.parameters:>10,}  {100 * result.accuracy:>8.2f}  "
            f"{100 * result.top5_accuracy:>8.2f}"
        )
    return "\n".join(lines)

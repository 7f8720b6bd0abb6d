"""Measure trained networks on a split: each image is decoded once, by one actor, for all networks."""

import functools
import operator
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray import ObjectRef
from torch import Tensor, nn

from tmkd_ray.config import TrainingConfig
from tmkd_ray.config.transfer import ClassificationConfig
from tmkd_ray.datasets.base import ImageDataset, Split
from tmkd_ray.datasets.decode import SetAside, decode_batch, list_set_aside
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.compute import ShardPlan, plan_shards
from tmkd_ray.models import build_model, count_parameters, load_checkpoint
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.stages.distillation import TrainedStudent, found_students
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.fitting import Fitted, found_clip, found_teacher, load_teacher
from tmkd_ray.stages.pipeline import actors_errors, plan_dataset
from tmkd_ray.stages.pretraining import zero_shot_student
from tmkd_ray.stages.progress import Rate, say
from tmkd_ray.stages.room import bundle, node_mark, nodes_room, wait_for_room
from tmkd_ray.stages.session import cluster_settings, num_gpus
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.tally import Metrics, Tally
from tmkd_ray.views.base import View

CHUNK_IMAGES = 512
"""What an actor decodes at once, and computes again if it is lost."""


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        module: uint8 [B, H, W, 3] to logits [B, C].
        parameters: number of its values.
        view: what it sees of the images; None: the images as they are.
    """

    name: str
    module: nn.Module
    parameters: int
    view: View | None = None


@dataclass(frozen=True)
class Networks:
    """What to measure in one pass: the visual teacher, if it is there, and those that are compared with it."""

    teacher: Network | None
    others: tuple[Network, ...]

    def all(self) -> tuple[Network, ...]:
        return self.others if self.teacher is None else (self.teacher, *self.others)


@dataclass(frozen=True)
class Measured:
    """One network's figures on a split; its agreement is with the visual teacher, on the images as they are.

    Attributes:
        confusion: (label, predicted class, images), ascending; pairs that were never met are left out.
        calibration: images, those of them that are right, and the sum of their confidences in each bin.
    """

    name: str
    parameters: int
    metrics: Metrics
    confusion: tuple[tuple[int, int, int], ...] = ()
    calibration: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Figures of all networks on the same images.

    Attributes:
        split: `test` or `validation`.
        num_images: that could be read, each counted once. set_aside: those that could not.
        teacher: the visual teacher's figures, None without one. others: in the order of the networks.
    """

    split: str
    num_images: int
    set_aside: list[SetAside]
    teacher: Measured | None
    others: list[Measured]


class Classifier(nn.Module):
    """uint8 [B, H, W, 3] to the logits [B, C] of a student or visual teacher."""

    def __init__(self, model: nn.Module, mean: ImageStatistics, std: ImageStatistics) -> None:
        super().__init__()
        self.model = model.eval()
        self.normalize = Normalize(mean, std)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        logits_BC: Tensor = self.model(self.normalize(images_BHWC)).logits
        return logits_BC


class _ZeroShot(nn.Module):
    """CLIP as a classifier (Radford et al. 2021, §3.1): similarity to each class's text, at its temperature."""

    text_bank: Tensor

    def __init__(self, clip: ClipTeacher, text_CE: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("text_bank", text_CE)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        return self.clip.encode_images(images_BHWC) @ self.text_bank.T / self.clip.temperature


def teacher_network(experiment: Experiment, teacher: Fitted) -> Network:
    """Load the visual teacher."""
    model = load_teacher(experiment, teacher).model
    name = f"visual teacher {experiment.config.teacher.visual.model}"
    return Network(name, Classifier(model, *experiment.teacher_statistics()), count_parameters(model))


def clip_networks(experiment: Experiment, fitted: Fitted) -> list[Network]:
    """Load CLIP as a zero-shot classifier of each view, by the view's own prompts."""
    clip = ClipTeacher.load(fitted.path)
    bank_VCE = clip.text_bank(list(experiment.prompts().values()), experiment.task.class_names)
    parameters = sum(p.numel() for p in clip.parameters())
    return [
        Network(f"CLIP zero-shot, {name}", _ZeroShot(clip, text_CE), parameters, view)
        for (name, view), text_CE in zip(experiment.views().items(), bank_VCE, strict=True)
    ]


def student_network(experiment: Experiment, student: TrainedStudent) -> Network:
    """Load a trained student: one that was pre-trained, as a zero-shot classifier of the dataset's classes."""
    config = experiment.config
    model = build_model(config.student.model, experiment.task)
    load_checkpoint(model, student.path)
    name = f"{student.method} seed {student.seed}: {config.student.model}"
    if student.projector is not None:
        zero_shot = zero_shot_student(experiment, student.method, model, student.projector)
        module = Classifier(zero_shot, config.dataset.mean, config.dataset.std)
        return Network(f"{name}, zero-shot", module, zero_shot.student.num_parameters())
    return Network(name, Classifier(model, config.dataset.mean, config.dataset.std), count_parameters(model))


def found_networks(experiment: Experiment) -> Networks:
    """Load every network of this configuration that is there.

    Raises:
        UserError: there is none, or one cannot be loaded.
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
    others = [] if clip is None else clip_networks(experiment, clip)
    others += [student_network(experiment, student) for student in students]
    return Networks(None if teacher is None else teacher_network(experiment, teacher), tuple(others))


class ChunkEvaluator:
    """Decode a chunk of a split once and run every network on it; a member of the evaluation's pool.

    Args:
        networks: `Networks` in the cluster's object store, in a list, so that Ray hands the reference on.
        split: of the dataset.
        batch_size: images per forward pass.
    """

    def __init__(
        self, networks: list[ObjectRef], dataset: ImageDataset, split: Split, device: str, batch_size: int
    ) -> None:
        loaded: Networks = ray.get(networks[0])
        self.has_teacher = loaded.teacher is not None
        self.networks = loaded.all()
        for network in self.networks:
            network.module.eval().to(device)
        self.dataset = dataset
        self.split = split
        self.device = device
        self.batch_size = batch_size
        cv2.setNumThreads(1)  # the pool is the parallelism

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a row of the chunk's number, its tallies by network (none without an image), and set_aside."""
        plan = ShardPlan.from_table(table)
        images_NHWC, reasons = decode_batch(self.dataset, self.split, plan.index)
        good = np.flatnonzero([reason is None for reason in reasons])
        tallies: list[Tally] = []
        for start in range(0, len(good), self.batch_size):
            rows = good[start : start + self.batch_size]
            batch = self._measure(images_NHWC[rows], plan.index.labels[rows], plan.index.ids[rows])
            tallies = [a + b for a, b in zip(tallies, batch, strict=True)] if tallies else batch
        set_aside = {
            str(sample): reason
            for sample, reason in zip(plan.index.ids, reasons, strict=True)
            if reason is not None
        }
        return pa.table({"number": [plan.number], "result": [pickle.dumps((tallies, set_aside))]})

    def _measure(self, images_BHWC: np.ndarray, labels_B: np.ndarray, ids_B: np.ndarray) -> list[Tally]:
        labels = torch.from_numpy(labels_B).to(self.device)
        teacher_logits_BC: Tensor | None = None
        tallies = []
        for position, network in enumerate(self.networks):
            seen_BHWC = images_BHWC if network.view is None else network.view(images_BHWC)
            logits_BC = network.module(torch.from_numpy(seen_BHWC).to(self.device))
            finite_B = logits_BC.isfinite().all(dim=1).cpu().numpy()
            if not finite_B.all():
                raise UserError(
                    f"{network.name} returned NaN or infinite logits for the image {ids_B[finite_B.argmin()]}; "
                    "check its weights and normalisation"
                )
            tallies.append(Tally.of(logits_BC, labels, teacher_logits_BC))
            if position == 0 and self.has_teacher:
                teacher_logits_BC = logits_BC
        return tallies


def measure(
    experiment: Experiment, networks: Networks, split: str, chunk_images: int = CHUNK_IMAGES
) -> Evaluation:
    """Measure networks on the `test` or `validation` images, on all workers; those set aside are said.

    The figures do not depend on the number of workers: the chunks are the same, and summed in their order.
    What a lost actor had in hand is computed again.

    Args:
        chunk_images: images an actor decodes at once.

    Raises:
        UserError: a network returns NaN, or not one image can be decoded.
    """
    config = experiment.config
    dataset_split: Split = "test" if split == "test" else "train"
    index = experiment.dataset.index("test") if split == "test" else experiment.validation
    # By place in the files, so that a block of a Parquet file is read by one chunk, or two.
    plans = plan_shards(split, index.take(np.lexsort((index.row, index.part))), chunk_images, 1)
    pool, device = worker_pool(config.training, len(plans), f"evaluation, {split}")
    arguments = (
        [ray.put(networks)],
        experiment.dataset,
        dataset_split,
        device,
        config.training.evaluation_batch_size,
    )
    dataset = plan_dataset([plan.to_table() for plan in plans]).map_batches(
        ChunkEvaluator, fn_constructor_args=arguments, **pool
    )
    progress = Rate(f"evaluation, {split}", len(index), "images")
    results: dict[int, bytes] = {}
    with actors_errors():
        for row in dataset.iter_rows():
            assert row["number"] not in results, "a chunk came twice"
            results[row["number"]] = row["result"]
            progress.advance(len(plans[row["number"]].index))
    chunks = [pickle.loads(results[plan.number]) for plan in plans]

    reasons = {sample: reason for _, set_aside in chunks for sample, reason in set_aside.items()}
    set_aside = [SetAside(sample, reasons[sample]) for sample in index.ids.tolist() if sample in reasons]
    if len(set_aside) == len(index):
        raise UserError(
            f"dataset {config.dataset.name}, {split} split: none of the {len(index)} images can be decoded; "
            f"the first, {set_aside[0].id}: {set_aside[0].reason}"
        )
    for line in list_set_aside(split, set_aside):
        say(line)
    by_network = zip(*(tallies for tallies, _ in chunks if tallies), strict=True)
    totals: list[Tally] = [functools.reduce(operator.add, tallies) for tallies in by_network]
    assert all(total.num_images == len(index) - len(set_aside) for total in totals)
    measured = [
        Measured(
            network.name,
            network.parameters,
            total.metrics(),
            tuple((*pair, count) for pair, count in sorted(total.confusion.items())),
            tuple(
                zip(
                    total.bin_counts.tolist(),
                    total.bin_hits.tolist(),
                    total.bin_confidences.tolist(),
                    strict=True,
                )
            ),
        )
        for network, total in zip(networks.all(), totals, strict=True)
    ]
    teacher = None if networks.teacher is None else measured.pop(0)
    return Evaluation(split, len(index) - len(set_aside), set_aside, teacher, measured)


def pool_size(training: TrainingConfig | ClassificationConfig, num_chunks: int) -> tuple[int, float]:
    """Return the number of actors and the GPUs of each: as many as train, if there is work and room for them.

    One GPU each where the cluster has GPUs and the training may use them, none otherwise. A cluster that grows
    makes room.
    """
    gpus = 0 if training.use_gpu is False else int(num_gpus())
    actors = min(training.num_workers, num_chunks, gpus or training.num_workers)
    if not cluster_settings().autoscaling:
        actors = min(actors, nodes_room("train", training.num_cpus_per_worker))
    return max(1, actors), float(gpus > 0)


def worker_pool(
    training: TrainingConfig | ClassificationConfig, num_chunks: int, label: str
) -> tuple[dict[str, Any], str]:
    """Return the options of `map_batches` for a pool on the nodes that train, and its device.

    Args:
        label: what the pool is for, in errors.

    Raises:
        UserError: there is no room for one actor.
    """
    actors, gpus = pool_size(training, num_chunks)
    actor = (label, bundle("train", training.num_cpus_per_worker, gpus))
    wait_for_room([actor], [actor] * (actors - 1))
    options: dict[str, Any] = {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "num_cpus": training.num_cpus_per_worker,
        "num_gpus": gpus or None,
        "resources": node_mark("train") or None,
        "compute": ray.data.ActorPoolStrategy(size=actors),
    }
    return options, "cuda" if gpus else "cpu"


def format_measured(evaluation: Evaluation) -> str:
    """Return a plain table of what was measured; `agree` and `KL` are with and from the visual teacher."""
    results: Sequence[Measured] = evaluation.others
    if evaluation.teacher is not None:
        results = [evaluation.teacher, *results]
    width = max(len(result.name) for result in results)
    lines = [
        f"{evaluation.split} split, {evaluation.num_images:,} images",
        f"{'':{width}}  {'params':>10}  {'top-1 %':>8}  {'top-5 %':>8}  "
        f"{'ECE %':>6}  {'agree %':>7}  {'KL':>7}",
    ]
    for result in results:
        metrics = result.metrics
        agreement = "–" if metrics.agreement is None else f"{100 * metrics.agreement:.2f}"
        teacher_kl = "–" if metrics.teacher_kl is None else f"{metrics.teacher_kl:.4f}"
        lines.append(
            f"{result.name:{width}}  {result.parameters:>10,}  {100 * metrics.accuracy:>8.2f}  "
            f"{100 * metrics.top5_accuracy:>8.2f}  {100 * metrics.ece:>6.2f}  {agreement:>7}  {teacher_kl:>7}"
        )
    return "\n".join(lines)

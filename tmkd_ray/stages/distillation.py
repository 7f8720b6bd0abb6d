"""Train students from the knowledge store: methods × seeds on one group of workers."""

import contextlib
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tmkd_ray import storage
from tmkd_ray.config import ObjectiveConfig, TrainingConfig
from tmkd_ray.datasets.decode import list_set_aside, load_images
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge import KnowledgeArrays, KnowledgeLayout, KnowledgeStore
from tmkd_ray.knowledge.node_copy import map_store
from tmkd_ray.knowledge.store import text_bank_key
from tmkd_ray.models import build_model
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.pretraining import PretrainingConfig
from tmkd_ray.stages.experiment import Experiment, identity_key, training_identity
from tmkd_ray.stages.fitting import found_clip, found_teacher, load_teacher
from tmkd_ray.stages.knowledge import check_store, num_shards
from tmkd_ray.stages.pretraining import OwnBank, TextTower, own_bank
from tmkd_ray.stages.streaming import StreamedKnowledge, StreamedStore
from tmkd_ray.stages.training import Outcome, TrainingJob, run_jobs
from tmkd_ray.teachers import ClipTeacher, FrozenTeachers, VisualTeacher
from tmkd_ray.training.loader import BatchSource, ResidentImages
from tmkd_ray.training.loop import TrainTask
from tmkd_ray.training.mapped import MappedImages, MappedKnowledge, StoredRows
from tmkd_ray.training.online import OnlineKnowledge
from tmkd_ray.training.pretraining import PROJECTOR, PretrainingTask
from tmkd_ray.training.student import StudentTask, labelled_positions, resident_source


@dataclass(frozen=True)
class TrainedStudent:
    """A student's weights and how it came to them.

    Attributes:
        projector: of a pre-trained student, its MLP head's file: its classifier is untrained, so it is measured
            by zero-shot. None where the classifier was trained.
    """

    method: str
    seed: int
    path: str
    outcome: Outcome
    projector: str | None = None


def distill(experiment: Experiment) -> list[TrainedStudent]:
    """Train every method with every seed, skipping what is finished.

    Raises:
        UserError: there is no knowledge store, it lacks what a method needs, or a training diverged.
    """
    jobs = student_jobs(experiment, write_banks=True)
    folder = storage.join(experiment.folder, "students", identity_key(*(job.key for _, _, job in jobs)))
    outcomes = run_jobs([job for _, _, job in jobs], folder)
    return [
        _trained(experiment, method, seed, job, outcome)
        for (method, seed, job), outcome in zip(jobs, outcomes, strict=True)
    ]


def _trained(
    experiment: Experiment, method: str, seed: int, job: TrainingJob, outcome: Outcome
) -> TrainedStudent:
    is_pretrained = isinstance(experiment.config.named_methods()[method], PretrainingConfig)
    return TrainedStudent(
        method,
        seed,
        storage.join(job.folder, "model.safetensors"),
        outcome,
        storage.join(job.folder, PROJECTOR) if is_pretrained else None,
    )


def found_students(experiment: Experiment) -> list[TrainedStudent]:
    """Return the students of this configuration that are trained already."""
    if not KnowledgeStore(experiment.store_path).is_finished():
        return []
    students = []
    for method, seed, job in student_jobs(experiment):
        outcome = job.outcome()
        if outcome is not None:
            students.append(_trained(experiment, method, seed, job, outcome))
    return students


def student_jobs(experiment: Experiment, write_banks: bool = False) -> list[tuple[str, int, TrainingJob]]:
    """Describe the trainings of all methods and seeds.

    Args:
        write_banks: encode the class names that pre-trainings bring with them, which the workers then read.
    """
    config = experiment.config
    store = KnowledgeStore(experiment.store_path)
    manifest = store.manifest()
    check_store(experiment, found_teacher(experiment), found_clip(experiment))
    if manifest.class_names != experiment.task.class_names:
        raise UserError(
            f"the knowledge store at {store.path} is of other classes than the dataset; run `tmkd knowledge`"
        )
    for split, count in num_shards(experiment).items():
        there = sum(shard.split == split for shard in manifest.shards)
        if there != count:
            raise UserError(
                f"the knowledge store at {store.path} has {there} of {count} shards of {split}; "
                "run `tmkd knowledge`"
            )
    methods = config.named_methods()
    for method, distiller in methods.items():
        if distiller.needs_text_teacher and manifest.layouts["train"].clip_width is None:
            raise UserError(
                f"{method} reads the column clip_embedding, which the knowledge store at {store.path} lacks: "
                "it was computed with teacher.text null; give it a text teacher and run `tmkd knowledge` again"
            )
    bank = clip = None
    if any(distiller.needs_text_teacher for distiller in methods.values()):
        clip = _text_teacher(experiment)
    if clip is not None:
        bank = text_bank_key(experiment.prompts(), experiment.task.class_names, clip.text_fingerprint)
    seeds = config.seeds or (config.training.seed,)
    jobs = []
    for method, distiller in methods.items():
        own = None
        if isinstance(distiller, PretrainingConfig):
            assert clip is not None
            own = own_bank(experiment, distiller, clip)
            if own is not None and write_banks:
                own.write()
        for seed in seeds:
            training = config.training.model_copy(update={"seed": seed})
            key = identity_key(
                "student",
                config.student.model,
                training_identity(training),
                distiller.model_dump(mode="json"),
                config.taught_views(distiller) if distiller.teacher != "none" else (),
                config.augmentation.model_dump(mode="json", exclude_none=True),
                (config.dataset.mean, config.dataset.std),
                bank if distiller.needs_text_teacher else None,
                manifest.fingerprint,
                config.knowledge.mode,
                *([] if own is None else [own.key]),
            )
            build: Callable[[torch.device], TrainTask]
            if isinstance(distiller, PretrainingConfig):
                assert clip is not None
                assert bank is not None
                origin = clip.origin(config.student.model, bank)
                build = functools.partial(
                    _build_pretraining, experiment, distiller, training, bank, own, origin
                )
            else:
                build = functools.partial(_build_student, experiment, distiller, training, bank)
            job = TrainingJob(
                key=key,
                label=f"{method} seed {seed}",
                folder=storage.join(experiment.folder, "students", f"{method}-seed{seed}-{key}"),
                training=training,
                build=build,
                beside_teachers=config.knowledge.mode == "streaming",
            )
            jobs.append((method, seed, job))
    return jobs


def _text_teacher(experiment: Experiment) -> TextTower | None:
    """Return this configuration's CLIP, if there is a text teacher."""
    found = found_clip(experiment)
    if found is not None:
        return TextTower(found.path)
    if experiment.config.teacher.text is not None:
        raise UserError("no CLIP is fitted for this configuration; run `tmkd fit-clip` and `tmkd knowledge`")
    return None


def _build_student(
    experiment: Experiment,
    distiller: DistillerConfig,
    training: TrainingConfig,
    bank: str | None,
    device: torch.device,
) -> TrainTask:
    config = experiment.config
    store = KnowledgeStore(experiment.store_path)
    validation = _validation(experiment, store, training, device)
    assert validation.images is not None
    source = _source(experiment, store, distiller, training, device)
    teacher_maps = None
    if distiller.needs_online:
        teacher_maps = _teachers(experiment)[0].model.map_shapes(config.dataset.image_size)
    constants = None
    if distiller.teacher != "none":
        constants = store.constants(bank if distiller.needs_text_teacher else None)
    torch.manual_seed(training.seed)  # loading teachers drew numbers; students start alike in every mode
    return StudentTask(
        build_model(config.student.model, experiment.task),
        source,
        store.manifest().layouts["train"],
        validation.images,
        validation.labels,
        constants,
        distiller,
        config.taught_views(distiller),
        training,
        config.dataset.mean,
        config.dataset.std,
        teacher_maps,
    )


def _build_pretraining(
    experiment: Experiment,
    pretraining: PretrainingConfig,
    training: TrainingConfig,
    bank: str,
    own: OwnBank | None,
    origin: dict[str, str],
    device: torch.device,
) -> TrainTask:
    config = experiment.config
    store = KnowledgeStore(experiment.store_path)
    validation = _validation(experiment, store, training, device)
    assert validation.images is not None
    source = _source(experiment, store, pretraining, training, device)
    torch.manual_seed(training.seed)  # as for any student
    return PretrainingTask(
        build_model(config.student.model, experiment.task),
        source,
        validation.images,
        validation.labels,
        store.constants(bank),
        pretraining,
        config.taught_views(pretraining),
        training,
        config.dataset.mean,
        config.dataset.std,
        None if own is None else own.read(),
        origin,
    )


def student_task(
    experiment: Experiment, training: TrainingConfig, bank: str | None, device: torch.device
) -> TrainTask:
    """Return the training of `distiller` on a store that is known to be whole and of this configuration."""
    distiller = experiment.config.distiller
    if isinstance(distiller, DistillerConfig):
        return _build_student(experiment, distiller, training, bank, device)
    clip = _text_teacher(experiment)
    assert clip is not None
    assert bank is not None
    own = own_bank(experiment, distiller, clip)
    if own is not None:
        own.write()
    origin = clip.origin(experiment.config.student.model, bank)
    return _build_pretraining(experiment, distiller, training, bank, own, origin, device)


def _validation(
    experiment: Experiment, store: KnowledgeStore, training: TrainingConfig, device: torch.device
) -> KnowledgeArrays:
    """Return the validation images and labels: mapped where the training's arrays are."""
    knowledge = experiment.config.knowledge
    if knowledge.mode == "cached" and _loader(experiment, store, training, device) != "resident":
        return map_store(store, "validation", knowledge.node_copies, functools.partial(read_images, experiment))
    return with_images(experiment, store.read("validation", with_teacher=False))


def _source(
    experiment: Experiment,
    store: KnowledgeStore,
    distiller: ObjectiveConfig,
    training: TrainingConfig,
    device: torch.device,
) -> BatchSource:
    """Return where the batches come from: the store, or the teachers themselves."""
    config, mode = experiment.config, experiment.config.knowledge.mode
    taught = distiller.teacher != "none"
    if mode == "cached":
        return _stored_source(experiment, store, training, device, taught)
    index = experiment.train
    # The few labels are drawn before an image is read, so that every method is given the same.
    positions = labelled_positions(index.ids, index.labels, training)
    index = index if positions is None else index.take(positions)
    if taught and mode == "streaming":
        return StreamedKnowledge(experiment, index, *_teachers(experiment), training, device)
    loaded = load_images(experiment.dataset, "train", index)
    images, labels, ids = loaded.images, loaded.labels, loaded.ids
    source: ResidentImages
    if not taught:
        source = ResidentImages(images, labels, ids, device, config.augmentation, training.seed)
        source.notes = list_set_aside("train", loaded.set_aside)
        return source
    visual, clip = _teachers(experiment)
    pools = config.knowledge
    teachers = FrozenTeachers(
        visual,
        clip,
        device,
        pools.visual.batch_size,
        pools.text.batch_size,
        pools.visual.precision,
        pools.text.precision,
        with_maps=distiller.needs_online,
    )
    source = OnlineKnowledge(
        images, labels, ids, experiment.views(), teachers, device, config.augmentation, pools.seed
    )
    source.notes = list_set_aside("train", loaded.set_aside)
    return source


def _stored_source(
    experiment: Experiment, store: KnowledgeStore, training: TrainingConfig, device: torch.device, taught: bool
) -> BatchSource:
    """Return the batches of a cached store, by the loader that the configuration names or the size asks for."""
    config = experiment.config
    loader = _loader(experiment, store, training, device)
    layout = store.manifest().layouts["train"]
    if loader == "resident":
        arrays = with_images(experiment, store.read("train", with_teacher=taught))
        return resident_source(arrays, training, config.augmentation, device, taught)
    if layout.image_format == "reference" and loader == "streaming":
        raise UserError(
            f"knowledge.loader={loader} reads the images from the store, which knowledge.images=reference "
            "leaves out; set knowledge.loader=resident or mapped, or store the images"
        )
    read = functools.partial(read_images, experiment)
    arrays = map_store(store, "train", config.knowledge.node_copies, read)
    rows = StoredRows(arrays, training.seed, labelled_positions(arrays.ids, arrays.labels, training))
    if not taught:
        return MappedImages(rows, device, config.augmentation, training.seed)
    if loader == "mapped":
        return MappedKnowledge(rows, device)
    return StreamedStore(store, rows, config.knowledge.views, config.knowledge.node_copies, training, device)


def _loader(
    experiment: Experiment, store: KnowledgeStore, training: TrainingConfig, device: torch.device
) -> str:
    """Return the loader of a cached store that the configuration names or the size asks for."""
    loader: str = experiment.config.knowledge.loader
    if loader == "auto":
        manifest = store.manifest()
        layout = manifest.layouts["train"]
        fits = _fits_memory(layout, manifest.rows("train"), device, training.num_workers)
        loader = "resident" if fits or layout.image_format == "reference" else "mapped"
    return loader


def _fits_memory(layout: KnowledgeLayout, rows: int, device: torch.device, num_workers: int) -> bool:
    """Return whether each worker can hold a split: once on a GPU, for a moment twice in the machine's memory.

    A part is left to the rest of the training, on GPUs the larger one.
    """
    arrays = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.arrays().values())
    encoded = 3 * layout.image_size**2 if layout.has_encoded_images else 0
    size = rows * (arrays + encoded)
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2:
        return False
    return 2 * size * num_workers < 0.8 * available_memory()


def available_memory() -> int:
    """Return the bytes of memory that this machine, or the container it is, can still give."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError):  # no /proc
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit (`max`)
        cgroup = Path("/sys/fs/cgroup")
        limit = int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text())
        available = min(available, limit)
    return available


def with_images(experiment: Experiment, arrays: KnowledgeArrays) -> KnowledgeArrays:
    """Return the arrays with their images: those of a store that only refers to them, read from the dataset."""
    return arrays if arrays.images is not None else replace(arrays, images=read_images(experiment, arrays))


def read_images(experiment: Experiment, arrays: KnowledgeArrays) -> np.ndarray:
    """Return the images of these samples, uint8 [N, H, W, 3], read from the dataset.

    Raises:
        UserError: one that the store refers to can no longer be read.
    """
    index = experiment.dataset.index("train")
    positions = {sample: position for position, sample in enumerate(index.ids.tolist())}
    wanted = index.take(np.array([positions[sample] for sample in arrays.ids.tolist()]))
    images = load_images(experiment.dataset, "train", wanted)
    if images.set_aside:
        entry = images.set_aside[0]
        raise UserError(
            f"{len(images.set_aside)} images that the knowledge store refers to can no longer be read; "
            f"the first, {entry.id}: {entry.reason}"
        )
    return images.images


def _teachers(experiment: Experiment) -> tuple[VisualTeacher, ClipTeacher | None]:
    """Load the frozen teachers."""
    visual, clip = found_teacher(experiment), found_clip(experiment)
    if visual is None or (clip is None and experiment.config.teacher.text is not None):
        raise UserError("the teachers of this configuration are not fitted yet; run `tmkd knowledge`")
    return load_teacher(experiment, visual), None if clip is None else ClipTeacher.load(clip.path)

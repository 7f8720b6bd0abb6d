"""Compute the knowledge store with Ray Data: CPU actors for views, actor pools for the frozen teachers."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tmkd_ray import augmentation
from tmkd_ray.config import ExperimentConfig, TeacherPoolConfig
from tmkd_ray.datasets.decode import SetAside, list_set_aside
from tmkd_ray.errors import UserError
from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge import KnowledgeLayout, KnowledgeStore, Manifest, compute
from tmkd_ray.knowledge.compute import ShardPlan, ShardWriter, ViewStage, plan_shards
from tmkd_ray.knowledge.fingerprint import Fingerprint
from tmkd_ray.knowledge.lease import WriterLease
from tmkd_ray.knowledge.store import text_bank_key
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.fitting import Fitted, load_teacher
from tmkd_ray.stages.pipeline import (
    actors_errors,
    knowledge_layouts,
    plan_dataset,
    teacher_stages,
    view_stage_options,
    write_stage,
)
from tmkd_ray.stages.progress import Rate, say
from tmkd_ray.stages.throughput import StageTimes, pool_sizes
from tmkd_ray.teachers import ClipTeacher, VisualTeacher

_MAX_SHARD_PIXELS = 64 * 2**20
"""Bytes of views that travel as one piece; larger images make smaller shards."""


@dataclass(frozen=True)
class KnowledgeResult:
    """A finished store and what it took.

    Attributes:
        text_bank: key of the prompts' text bank; None without a text teacher.
        seconds: of this run; `computed`: shards that this run computed; `times`: None where it computed none.
    """

    store: KnowledgeStore
    manifest: Manifest
    text_bank: str | None
    seconds: float
    computed: int
    times: StageTimes | None
    visual_parameters: int
    clip_parameters: int

    def constants(self) -> TeacherConstants:
        return self.store.constants(self.text_bank)


def check_store(
    experiment: Experiment, teacher: Fitted | None = None, clip_fitted: Fitted | None = None
) -> None:
    """Refuse a store of another configuration, as far as can be told: without a teacher, all but the teachers.

    Raises:
        KnowledgeMismatchError: names every difference.
        UserError: nothing says what the store was computed from.
    """
    store = KnowledgeStore(experiment.store_path)
    if not store.committed():
        return
    wanted = _without_teachers(experiment)
    if teacher is not None:
        clip = None if clip_fitted is None else ClipTeacher.load(clip_fitted.path)
        wanted = fingerprint(experiment, load_teacher(experiment, teacher), clip)
    store.check(wanted, partly=True)


def compute_knowledge(experiment: Experiment, teacher: Fitted, clip_fitted: Fitted | None) -> KnowledgeResult:
    """Compute what is missing of the store; nothing at all if it is whole and of this configuration.

    Raises:
        KnowledgeMismatchError: the store at this path is of another configuration.
        UserError: a teacher cannot be loaded, does not fit the classes, or returns NaN.
    """
    started = time.monotonic()
    config = experiment.config
    visual = load_teacher(experiment, teacher)
    clip = None if clip_fitted is None else ClipTeacher.load(clip_fitted.path)
    layouts = knowledge_layouts(config, visual, clip)
    store = KnowledgeStore(experiment.store_path)
    wanted = fingerprint(experiment, visual, clip)
    bank = None
    if clip is not None:
        bank = text_bank_key(experiment.prompts(), experiment.task.class_names, clip.text_fingerprint())
    times, missing = None, _missing(experiment, store, wanted)
    if not missing and _is_whole(experiment, store, bank):
        say(f"knowledge: the store at {store.path} is whole and matches, reused")
    else:
        with WriterLease(store.path) as lease:
            if lease.took_over is not None:
                say(f"knowledge: {lease.took_over}")
            store.begin(wanted)
            missing = _missing(experiment, store, wanted)
            if missing:
                _say_estimate(experiment, missing, layouts, store.path)
                times = _compute_shards(experiment, missing, visual, clip, store, layouts, lease)
                for line in times.lines():
                    say(line)
            store.write_head(visual.head_weight, visual.head_bias)
            if clip is not None and bank is not None and not store.has_text_bank(bank):
                prompts = list(experiment.prompts().values())
                text_bank = clip.text_bank(prompts, experiment.task.class_names)
                store.write_text_bank(bank, text_bank, clip.temperature)
            lease.check()
            if missing or not _is_whole(experiment, store, bank):
                _finish(experiment, store, layouts)
    manifest = store.manifest()
    if times is not None:
        size, total = manifest.bytes_per_image_and_variant(), manifest.total_bytes()
        say(f"knowledge: {size / 1024:.2f} KB an image and variant on disk, {total / 2**20:,.0f} MB in all")
    for line in list_set_aside("knowledge", [SetAside(**entry) for entry in manifest.set_aside]):
        say(line)
    return KnowledgeResult(
        store,
        manifest,
        bank,
        seconds=time.monotonic() - started,
        computed=len(missing),
        times=times,
        visual_parameters=sum(p.numel() for p in visual.parameters()),
        clip_parameters=0 if clip is None else sum(p.numel() for p in clip.parameters()),
    )


def fingerprint(experiment: Experiment, visual: VisualTeacher, clip: ClipTeacher | None) -> Fingerprint:
    """Return what the store's content depends on."""
    pools = experiment.config.knowledge
    return _without_teachers(experiment) | {
        "visual_teacher": {
            "model": experiment.config.teacher.visual.model,
            "weights": visual.fingerprint(),
            "statistics": experiment.teacher_statistics(),
            **_arithmetic(pools.visual),
        },
        "text_teacher": None if clip is None else {"weights": clip.fingerprint(), **_arithmetic(pools.text)},
    }


def _without_teachers(experiment: Experiment) -> Fingerprint:
    config = experiment.config
    return {
        "version": compute.VERSION,
        "dataset": experiment.data_identity(),
        "augmentation": {
            "version": augmentation.VERSION,
            "seed": config.knowledge.seed,
            "num_variants": config.knowledge.num_variants,
            **config.augmentation.model_dump(mode="json", exclude_none=True),
        },
        "views": experiment.view_identity(),
        "view_order": list(config.views),
        "dtype": config.knowledge.dtype,
        "images": config.knowledge.images,
        "shard_rows": _shard_rows(config),
    }


def _arithmetic(pool: TeacherPoolConfig) -> dict[str, Any]:
    """Return the settings that decide the last bits of a teacher's output."""
    return pool.model_dump(include={"batch_size", "precision", "channels_last", "compile"})


def _plans(experiment: Experiment) -> list[ShardPlan]:
    """Return the shards of the store: `validation` alone where the teachers run beside the training."""
    rows = _shard_rows(experiment.config)
    plans = plan_shards("validation", experiment.validation, rows, 1)
    if experiment.config.knowledge.mode == "cached":
        plans = plan_shards("train", experiment.train, rows, experiment.config.knowledge.num_variants) + plans
    return plans


def num_shards(experiment: Experiment) -> dict[str, int]:
    """Return how many shards of each split the store must hold."""
    rows = _shard_rows(experiment.config)
    counts = {"validation": -(-len(experiment.validation) // rows)}
    if experiment.config.knowledge.mode == "cached":
        counts["train"] = -(-len(experiment.train) // rows)
    return counts


def _missing(experiment: Experiment, store: KnowledgeStore, wanted: Fingerprint) -> list[ShardPlan]:
    """Return the planned shards that the store lacks.

    Raises:
        KnowledgeMismatchError: it is another configuration's store.
    """
    done = store.committed()
    if done:
        store.check(wanted)
    return [plan for plan in _plans(experiment) if (plan.split, plan.number) not in done]


def _is_whole(experiment: Experiment, store: KnowledgeStore, bank: str | None) -> bool:
    """Return whether a store without missing shards lacks nothing else either."""
    there = store.is_finished() and store.has_head() and (bank is None or store.has_text_bank(bank))
    if not there:
        return False
    manifest = store.manifest()
    shards = Counter(shard.split for shard in manifest.shards)
    enough = all(shards[split] == count for split, count in num_shards(experiment).items())
    return enough and manifest.class_names == experiment.task.class_names


def _finish(experiment: Experiment, store: KnowledgeStore, layouts: dict[str, KnowledgeLayout]) -> None:
    expected = num_shards(experiment)
    if any(split not in expected for split, _ in store.committed()):
        raise UserError(
            f"the store at {store.path} is that of an unfinished `knowledge.mode: cached`; finish it, "
            f"or give knowledge.path another folder for mode {experiment.config.knowledge.mode}"
        )
    store.finish(experiment.task.class_names, layouts, expected)


def _say_estimate(
    experiment: Experiment, missing: list[ShardPlan], layouts: dict[str, KnowledgeLayout], path: str
) -> None:
    layout = layouts["train"]
    per_image = layout.bytes_per_image()
    images = sum(len(plan.index) for plan in missing)
    total = sum(len(plan.index) * layouts[plan.split].bytes_per_image() for plan in missing)
    done = sum(num_shards(experiment).values()) - len(missing)
    say(
        f"knowledge: {images:,} images to compute in {len(missing)} shards ({done} done), about "
        f"{per_image / layout.num_variants / 1024:.2f} KB an image and variant ({layout.dtype}, images "
        f"{layout.image_format}), {total / 2**20:,.0f} MB → {path}"
    )


def _shard_rows(config: ExperimentConfig) -> int:
    pixels = config.knowledge.num_variants * len(config.views) * config.dataset.image_size**2 * 3
    return min(config.knowledge.shard_rows, max(1, _MAX_SHARD_PIXELS // pixels))


def _compute_shards(
    experiment: Experiment,
    plans: list[ShardPlan],
    visual: VisualTeacher,
    clip: ClipTeacher | None,
    store: KnowledgeStore,
    layouts: dict[str, KnowledgeLayout],
    lease: WriterLease,
) -> StageTimes:
    """Run the shards through the cluster; each is committed by the writer as soon as it is whole."""
    dataset = teacher_stages(
        plan_dataset([plan.to_table() for plan in plans]),
        experiment.config,
        ViewStage,
        view_stage_options(experiment, layouts),
        visual,
        clip,
        layouts,
    )
    pools = experiment.config.knowledge
    writers = min(pools.views.max_size, len(plans))
    dataset = write_stage(dataset, ShardWriter(store, layouts), writers)
    times = StageTimes(pool_sizes(pools) | {"write": writers})
    rate = Rate("knowledge", sum(len(plan.index) for plan in plans), "images")
    variants = {split: layout.num_variants for split, layout in layouts.items()}
    with actors_errors():
        for row in dataset.iter_rows():
            lease.check()
            images = row["rows"] + row["set_aside"]
            times.add(row, images * variants[row["split"]])
            rate.advance(images)
    return times

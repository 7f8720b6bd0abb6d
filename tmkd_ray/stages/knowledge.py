"""Compute the knowledge store with Ray Data: CPU actors for views, actor pools for the frozen teachers."""

import math
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from tmkd_ray import augmentation
from tmkd_ray.config import ExperimentConfig, PoolConfig, TeacherPoolConfig
from tmkd_ray.datasets.decode import SetAside, list_set_aside
from tmkd_ray.errors import UserError
from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge import KnowledgeLayout, KnowledgeStore, Manifest, compute
from tmkd_ray.knowledge.compute import ClipStage, ShardPlan, ShardWriter, ViewStage, VisualStage, plan_shards
from tmkd_ray.knowledge.fingerprint import Fingerprint, check_match
from tmkd_ray.knowledge.store import text_bank_key
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.fitting import Fitted, load_teacher
from tmkd_ray.stages.progress import Rate, say
from tmkd_ray.stages.session import num_gpus
from tmkd_ray.teachers import ClipTeacher, VisualTeacher

_MAX_SHARD_PIXELS = 64 * 2**20
"""Bytes of views that travel as one piece; larger images make smaller shards."""


@dataclass(frozen=True)
class KnowledgeResult:
    """A finished store and what it took.

    Attributes:
        text_bank: key of the prompts' text bank; None without a text teacher.
        seconds: of this run; `computed`: shards that this run computed.
    """

    store: KnowledgeStore
    manifest: Manifest
    text_bank: str | None
    seconds: float
    computed: int
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
    """
    store = KnowledgeStore(experiment.store_path)
    stored = store.fingerprint()
    if stored is None or not store.committed():
        return
    wanted = _without_teachers(experiment)
    if teacher is not None:
        clip = None if clip_fitted is None else ClipTeacher.load(clip_fitted.path)
        wanted = fingerprint(experiment, load_teacher(experiment, teacher), clip)
    check_match({name: stored.get(name) for name in wanted}, wanted, experiment.store_path)


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
    layouts = _layouts(config, visual, clip)
    shard_rows = _shard_rows(config)
    store = KnowledgeStore(experiment.store_path)
    store.begin(fingerprint(experiment, visual, clip))

    plans = [
        *plan_shards("train", experiment.train, shard_rows),
        *plan_shards("validation", experiment.validation, shard_rows),
    ]
    done = store.committed()
    missing = [plan for plan in plans if (plan.split, plan.number) not in done]
    if missing:
        bytes_each = layouts["train"].bytes_per_image()
        say(
            f"knowledge: {sum(len(plan.index) for plan in missing):,} images to compute in {len(missing)} "
            f"shards ({len(done)} done), {bytes_each / 1024:.1f} KB an image before compression → {store.path}"
        )
        _compute_shards(experiment, missing, visual, clip, store, layouts)
    store.write_head(visual.head_weight, visual.head_bias)
    bank = _ensure_text_bank(experiment, store, clip)
    names = experiment.task.class_names
    if missing or not store.is_finished() or store.manifest().class_names != names:
        manifest = store.finish(names, layouts)
    else:
        manifest = store.manifest()
        say(f"knowledge: the store at {store.path} is whole and matches, reused")
    assert len(manifest.shards) == len(plans), "shards that no plan names"
    for line in list_set_aside("knowledge", [SetAside(**entry) for entry in manifest.set_aside]):
        say(line)
    return KnowledgeResult(
        store,
        manifest,
        bank,
        seconds=time.monotonic() - started,
        computed=len(missing),
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
            **config.augmentation.model_dump(mode="json"),
        },
        "views": experiment.view_identity(),
        "view_order": list(config.views),
        "dtype": config.knowledge.dtype,
        "shard_rows": _shard_rows(config),
    }


def _arithmetic(pool: TeacherPoolConfig) -> dict[str, Any]:
    """Return the settings that decide the last bits of a teacher's output."""
    return {"batch_size": pool.batch_size, "precision": pool.precision}


def _layouts(
    config: ExperimentConfig, visual: VisualTeacher, clip: ClipTeacher | None
) -> dict[str, KnowledgeLayout]:
    def layout(num_variants: int) -> KnowledgeLayout:
        return KnowledgeLayout(
            views=tuple(config.views),
            num_variants=num_variants,
            image_size=config.dataset.image_size,
            feature_width=visual.feature_width,
            clip_width=None if clip is None else clip.embedding_width,
            dtype=config.knowledge.dtype,
        )

    return {"train": layout(config.knowledge.num_variants), "validation": layout(1)}


def _shard_rows(config: ExperimentConfig) -> int:
    pixels = config.knowledge.num_variants * len(config.views) * config.dataset.image_size**2 * 3
    return min(config.knowledge.shard_rows, max(1, _MAX_SHARD_PIXELS // pixels))


def _ensure_text_bank(experiment: Experiment, store: KnowledgeStore, clip: ClipTeacher | None) -> str | None:
    if clip is None:
        return None
    prompts, names = experiment.prompts(), experiment.task.class_names
    key = text_bank_key(prompts, names, clip.text_fingerprint())
    if not store.has_text_bank(key):
        store.write_text_bank(key, clip.text_bank(list(prompts.values()), names), clip.temperature)
    return key


class _VisualActor(VisualStage):
    """A member of the visual teacher's pool; `model` lies in the cluster's object store."""

    def __init__(self, model: list[Any], *arguments: Any) -> None:
        super().__init__(ray.get(model[0]), *arguments)


class _ClipActor(ClipStage):
    """A member of CLIP's pool; `model` lies in the cluster's object store."""

    def __init__(self, model: list[Any], *arguments: Any) -> None:
        super().__init__(ray.get(model[0]), *arguments)


def _compute_shards(
    experiment: Experiment,
    plans: list[ShardPlan],
    visual: VisualTeacher,
    clip: ClipTeacher | None,
    store: KnowledgeStore,
    layouts: dict[str, KnowledgeLayout],
) -> None:
    """Run the shards through the cluster; each is committed by the writer as soon as it is whole."""
    config = experiment.config
    context = ray.data.DataContext.get_current()
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a shard is one row and must not be cut
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that a UserError of an actor arrives as one

    dataset = ray.data.from_arrow([plan.to_table() for plan in plans]).map_batches(
        ViewStage,
        fn_constructor_args=(
            experiment.dataset,
            experiment.views(),
            layouts,
            config.augmentation,
            config.knowledge.seed,
        ),
        **_pool(config.knowledge.views, 0.0),
    )
    teachers: list[tuple[type, torch.nn.Module, TeacherPoolConfig]] = [
        (_VisualActor, visual, config.knowledge.visual)
    ]
    if clip is not None:
        teachers.append((_ClipActor, clip, config.knowledge.text))
    share = _gpu_share([pool for _, _, pool in teachers])
    for actor, model, pool in teachers:
        gpus = share if pool.num_gpus is None else pool.num_gpus
        device = "cuda" if gpus > 0 else "cpu"
        arguments = ([ray.put(model)], layouts, device, pool.batch_size, pool.precision)
        dataset = dataset.map_batches(actor, fn_constructor_args=arguments, **_pool(pool, gpus))
    writer = ShardWriter(store, layouts)

    def write(table: pa.Table) -> pa.Table:
        return writer(table)

    dataset = dataset.map_batches(write, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
    rate = Rate("knowledge", sum(len(plan.index) for plan in plans), "images")
    try:
        for row in dataset.iter_rows():
            rate.advance(row["rows"] + row["set_aside"])
    except UserError as error:
        # Ray's error for it carries a traceback; `cause` is what the actor raised.
        raise UserError(str(getattr(error, "cause", error))) from error


def _pool(pool: PoolConfig, gpus: float) -> dict[str, Any]:
    """Return the options of `map_batches` for a pool; one batch is one shard, which is one row."""
    return {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "num_cpus": pool.num_cpus,
        "num_gpus": gpus or None,
        "compute": ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
    }


def _gpu_share(pools: list[TeacherPoolConfig]) -> float:
    """Return the share of a GPU for each actor that does not say: all pools must fit the cluster at once."""
    available = num_gpus() - sum(pool.min_size * (pool.num_gpus or 0.0) for pool in pools)
    asking = sum(pool.min_size for pool in pools if pool.num_gpus is None)
    if available <= 0 or asking == 0:
        return 0.0
    if available < 1:
        return math.floor(100 * available / asking) / 100
    # An actor's share lies on one GPU: so many actors a GPU that all of them find a place.
    per_gpu = math.ceil(asking / math.floor(available))
    return math.floor(100 / per_gpu) / 100

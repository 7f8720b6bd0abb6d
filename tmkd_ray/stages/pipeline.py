"""The one lazy expression from images to knowledge, as Ray Data runs it; written once or streamed."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from tmkd_ray.config import ExperimentConfig, KnowledgeConfig, PoolConfig, TeacherPoolConfig
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge import KnowledgeLayout
from tmkd_ray.knowledge.compute import ClipStage, VisualStage
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.room import Bundle, NodeKind, bundle, node_mark, wait_for_room
from tmkd_ray.stages.session import cluster_settings, num_gpus
from tmkd_ray.teachers import ClipTeacher, VisualTeacher


class _VisualActor(VisualStage):
    """A member of the visual teacher's pool; `model` lies in the cluster's object store."""

    def __init__(self, model: list[Any], *arguments: Any) -> None:
        super().__init__(ray.get(model[0]), *arguments)


class _ClipActor(ClipStage):
    """A member of CLIP's pool; `model` lies in the cluster's object store."""

    def __init__(self, model: list[Any], *arguments: Any) -> None:
        super().__init__(ray.get(model[0]), *arguments)


def knowledge_layouts(
    config: ExperimentConfig, visual: VisualTeacher, clip: ClipTeacher | None
) -> dict[str, KnowledgeLayout]:
    """Return the layout of each split of the knowledge."""

    def layout(num_variants: int) -> KnowledgeLayout:
        return KnowledgeLayout(
            views=tuple(config.views),
            num_variants=num_variants,
            image_size=config.dataset.image_size,
            feature_width=visual.feature_width,
            clip_width=None if clip is None else clip.embedding_width,
            dtype=config.knowledge.dtype,
            image_format=config.knowledge.images,
        )

    return {"train": layout(config.knowledge.num_variants), "validation": layout(1)}


def view_stage_options(experiment: Experiment, layouts: dict[str, KnowledgeLayout]) -> tuple[Any, ...]:
    """Return the arguments of a `ViewStage`."""
    config = experiment.config
    return (experiment.dataset, experiment.views(), layouts, config.augmentation, config.knowledge.seed)


def teacher_stages(
    dataset: ray.data.Dataset,
    config: ExperimentConfig,
    view_actor: type,
    view_arguments: tuple[Any, ...],
    visual: VisualTeacher,
    clip: ClipTeacher | None,
    layouts: dict[str, KnowledgeLayout],
    gpus_taken: Sequence[float] = (),
) -> ray.data.Dataset:
    """Return the dataset of plans, mapped through the view pool and the teachers' pools.

    Args:
        dataset: one block of one row for each shard or piece.
        view_actor: class of the view pool's actors, built from `view_arguments`.
        gpus_taken: share of a GPU that each worker of the training beside it holds.

    Raises:
        UserError: the cluster has no room for the pools at their smallest.
    """
    pools: list[tuple[str, PoolConfig, float, NodeKind]] = [
        ("knowledge.views", config.knowledge.views, 0.0, "views")
    ]
    shares = _gpu_shares(config.knowledge, clip is not None, gpus_taken)
    pools.append(("knowledge.visual", config.knowledge.visual, shares[0], "teacher"))
    if clip is not None:
        pools.append(("knowledge.text", config.knowledge.text, shares[1], "teacher"))
    wait_for_pools(pools)
    dataset = view_stage(dataset, view_actor, view_arguments, config.knowledge.views)
    return teachers_of_views(dataset, config.knowledge, visual, clip, layouts, gpus_taken)


def wait_for_pools(pools: Sequence[tuple[str, PoolConfig, float, NodeKind]]) -> None:
    """Wait for room for pools at their smallest; a cluster that autoscales is asked for all of them at once.

    Args:
        pools: (path in the configuration, the pool, GPU share of an actor, where it runs).
    """
    needed: list[tuple[str, Bundle]] = []
    wanted: list[tuple[str, Bundle]] = []
    for name, pool, gpus, kind in pools:
        actor = bundle(kind, pool.num_cpus, gpus)
        if actor:
            needed += [(name, actor)] * pool.min_size
            wanted += [(name, actor)] * (pool.max_size - pool.min_size)
    if needed:
        wait_for_room(needed, wanted)


@contextlib.contextmanager
def actors_errors() -> Iterator[None]:
    """Let a UserError of an actor come out as it was raised there; Ray's own for it carries a traceback."""
    try:
        yield
    except UserError as error:
        raise UserError(str(getattr(error, "cause", error))) from error


def plan_dataset(tables: Sequence[pa.Table]) -> ray.data.Dataset:
    """Return a dataset of plans, a block of one row for each, with the settings that shards need."""
    context = ray.data.DataContext.get_current()
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a shard is one row and must not be cut
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that a UserError of an actor arrives as one
    # `from_arrow` runs a task of one CPU for each, for which a growing cluster would start nodes of any kind.
    return ray.data.from_blocks(list(tables))


def view_stage(
    dataset: ray.data.Dataset, actor: type, arguments: tuple[Any, ...], pool: PoolConfig
) -> ray.data.Dataset:
    """Return the dataset of plans, mapped through the view pool."""
    return dataset.map_batches(actor, fn_constructor_args=arguments, **_pool(pool, 0.0, "views"))


def teachers_of_views(
    dataset: ray.data.Dataset,
    pools: KnowledgeConfig,
    visual: VisualTeacher,
    clip: ClipTeacher | None,
    layouts: dict[str, KnowledgeLayout],
    gpus_taken: Sequence[float] = (),
) -> ray.data.Dataset:
    """Return the dataset of views, mapped through the teachers' pools; the last one drops the pixels."""
    teachers: list[tuple[type, VisualTeacher | ClipTeacher, TeacherPoolConfig]] = [
        (_VisualActor, visual, pools.visual)
    ]
    if clip is not None:
        teachers.append((_ClipActor, clip, pools.text))
    shares = _gpu_shares(pools, clip is not None, gpus_taken)
    for number, ((actor, model, pool), gpus) in enumerate(zip(teachers, shares, strict=True)):
        device = _device(gpus)
        last = number == len(teachers) - 1
        arguments = (
            [ray.put(model)],
            layouts,
            device,
            pool.batch_size,
            pool.precision,
            pool.channels_last,
            pool.compile,
            last,
        )
        dataset = dataset.map_batches(actor, fn_constructor_args=arguments, **_pool(pool, gpus, "teacher"))
    return dataset


def _gpu_shares(pools: KnowledgeConfig, with_clip: bool, taken: Sequence[float]) -> list[float]:
    """Return the share of a GPU for each actor of the visual teacher's pool, and of CLIP's if there is one."""
    teachers = [pools.visual, pools.text] if with_clip else [pools.visual]
    share = gpu_share(teachers, taken)
    return [share if pool.num_gpus is None else pool.num_gpus for pool in teachers]


def _device(gpus: float) -> str:
    return "cuda" if gpus > 0 else "cpu"


def write_stage(
    dataset: ray.data.Dataset, writer: Callable[[pa.Table], pa.Table], num_writers: int
) -> ray.data.Dataset:
    """Return the dataset of finished shards, written by at most so many tasks at a time.

    Without a bound Ray Data starts as many as fit its CPUs: each is a process that first imports PyTorch, and
    memory of its own.
    """

    def write(table: pa.Table) -> pa.Table:
        return writer(table)

    compute = ray.data.TaskPoolStrategy(size=num_writers)
    return dataset.map_batches(write, batch_size=1, batch_format="pyarrow", num_cpus=0.25, compute=compute)


def _pool(pool: PoolConfig, gpus: float, kind: NodeKind) -> dict[str, Any]:
    """Return the options of `map_batches` for a pool; one batch is one shard, which is one row."""
    # Ray Data adds an actor where it sees room for one, and on a cluster that is to grow it sees none (its
    # issue 59144). Actors that wait make the autoscaler start their nodes, all at once.
    initial = pool.max_size if cluster_settings().autoscaling else pool.min_size
    return {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "num_cpus": pool.num_cpus,
        "num_gpus": gpus or None,
        "resources": node_mark(kind) or None,
        "compute": ray.data.ActorPoolStrategy(
            min_size=pool.min_size, max_size=pool.max_size, initial_size=initial
        ),
    }


def gpu_share(pools: list[TeacherPoolConfig], taken: Sequence[float] = ()) -> float:
    """Return the share of a GPU for each actor that does not say: all pools must fit the cluster at once.

    Args:
        taken: share of a GPU that each training worker beside them holds; no two of them on one GPU.
    """
    gpus = num_gpus()

    def size(pool: TeacherPoolConfig) -> int:
        return pool.max_size if cluster_settings().autoscaling else pool.min_size

    asking = sum(size(pool) for pool in pools if pool.num_gpus is None)
    if gpus <= 0 or asking == 0:
        return 0.0
    if taken and max(taken) < 1.0:  # what a worker leaves of each GPU
        per_gpu = math.ceil(asking / math.floor(gpus))
        return math.floor(100 * (1.0 - max(taken)) / per_gpu + 1e-9) / 100
    available = gpus - sum(taken) - sum(size(pool) * (pool.num_gpus or 0.0) for pool in pools)
    if available <= 0:
        return 0.0
    if available < 1:
        return math.floor(100 * available / asking) / 100
    # An actor's share lies on one GPU: so many actors a GPU that all of them find a place.
    per_gpu = math.ceil(asking / math.floor(available))
    return math.floor(100 / per_gpu) / 100

"""What a run would take on a cluster: images a second, hours, bytes, dollars, and what holds the rest back.

A model of the road in two dozen numbers (`Constants`): what `benchmarks/plan_constants.py` measured, and what
it cannot, which says so. Per stage: work of an image ÷ what the nodes do in a second. Knowledge is a pipeline,
as fast as its slowest stage, between what the driver does alone before and after it; trainings come last, one
after the other. docs/scaling.md explains it.
"""

import importlib.resources
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch.utils.flop_counter import FlopCounterMode

from tmkd_ray import storage
from tmkd_ray.config import ExperimentConfig, TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge import KnowledgeLayout
from tmkd_ray.models import build_model
from tmkd_ray.settings import Settings, explain
from tmkd_ray.types import TaskSpec

NODE_KINDS = ("views", "teacher", "train")

_SHARD_BYTES = 64 * 2**20
"""Of views that travel as one piece, as in the knowledge stage."""

_REQUESTS_AT_ONCE = 32
"""Of the driver to the object store, as in `knowledge.store`."""

_OF_MEMORY = 0.5
"""The part of a machine's memory that the data may take: the rest is the programs' and Ray's object store."""


class PerSize(Settings):
    """Seconds of one core for an image, at two image sizes; in between linear in the number of pixels."""

    at_32: float = Field(gt=0)
    at_224: float = Field(gt=0)

    def at(self, size: int) -> float:
        slope = (self.at_224 - self.at_32) / (224**2 - 32**2)
        return max(self.at_32 + slope * (size**2 - 32**2), self.at_32 * (size / 32) ** 2 if size < 32 else 0.0)


class CoreConstants(Settings):
    """What one core does.

    Attributes:
        decode_s: to read, decode and store an image, whatever the number of its variants.
        variant_s: to augment it once more and compute the views.
        write_bytes_per_s: of a shard as Parquet. flops: float32 operations a second of a convolutional network.
        matmul_flops: of a large matrix product, which bounds `flops`.
        step_over_forward: time of a training step over that of its forward pass.
    """

    decode_s: PerSize
    variant_s: PerSize
    write_bytes_per_s: float = Field(gt=0)
    flops: float = Field(gt=0)
    matmul_flops: float = Field(gt=0)
    step_over_forward: float = Field(gt=1)

    @property
    def utilisation(self) -> float:
        """The part of a core that a network reaches."""
        return self.flops / self.matmul_flops


class RayConstants(Settings):
    """What Ray takes.

    Attributes:
        start_s: to start a pipeline of actors. shard_s: of its scheduler for each shard that passes.
        object_bytes_per_s: that one process puts into the object store and reads from it again.
    """

    start_s: float = Field(ge=0)
    shard_s: float = Field(gt=0)
    object_bytes_per_s: float = Field(gt=0)


class DriverConstants(Settings):
    """What grows with the data on the one machine that drives a run.

    Attributes:
        image_s: to list an image, choose its split and hash its id. image_bytes: of memory for that, at most.
        image_kept_bytes: of the list that goes to each process of the run.
        shard_s: to plan a shard, hand it to Ray, and find, check and list it in the manifest when it is done,
            on a local disk. shard_bytes: of memory at most. manifest_bytes: of the file.
    """

    image_s: float = Field(gt=0)
    image_bytes: float = Field(ge=0)
    image_kept_bytes: float = Field(gt=0)
    shard_s: float = Field(gt=0)
    shard_bytes: float = Field(ge=0)
    manifest_bytes: float = Field(gt=0)


class ObjectStore(Settings):
    """An object store; `source` says whose word that is.

    Attributes:
        reads_per_s, writes_per_s: that it answers within one folder before it throttles.
        request_s: until it answers a small request.
    """

    reads_per_s: float = Field(gt=0)
    writes_per_s: float = Field(gt=0)
    request_s: float = Field(gt=0)
    source: str


class Gpu(Settings):
    """Operations a second that a GPU's maker states (dense), and the part of them that a network reaches."""

    float32: float = Field(gt=0)
    bfloat16: float = Field(gt=0)
    float16: float = Field(gt=0)
    utilisation: float = Field(gt=0, le=1)
    is_estimate: bool = Field(description="whether utilisation is assumed, not measured")
    source: str


class Node(Settings):
    """A kind of machine and what it costs."""

    machine: str
    cores: int = Field(ge=1)
    memory_gib: float = Field(gt=0)
    disk_gib: float = Field(gt=0)
    network_gbit: float = Field(gt=0, description="that it holds, not for a burst")
    gpus: int = Field(default=0, ge=0)
    gpu: str | None = None
    dollars_per_hour: float = Field(ge=0)


class Prices(Settings):
    """Of the object store; and where and when all prices are from."""

    note: str
    dollars_per_gb_month: float = Field(ge=0)
    dollars_per_1000_writes: float = Field(ge=0)
    dollars_per_1000_reads: float = Field(ge=0)


class Measured(Settings):
    """On what, when, by what and at which sizes the measured numbers were."""

    hardware: str
    date: str
    software: str
    sizes: dict[str, int]

    def __str__(self) -> str:
        return f"measured {self.date} on {self.hardware} ({self.software})"


class Assumptions(Settings):
    """What `benchmarks/plan_constants.py` does not measure: assumed, looked up, or an example."""

    gpus: dict[str, Gpu]
    nodes: dict[Literal["head", "views", "teacher", "train"], Node]
    store: ObjectStore
    prices: Prices


class Constants(Assumptions):
    """The numbers of the model: what was measured, and what is assumed."""

    measured: Measured
    core: CoreConstants
    ray: RayConstants
    driver: DriverConstants


@dataclass(frozen=True)
class Stage:
    """A stage of the plan.

    Attributes:
        per_s: images a second (of the dataset, all their variants) on all its workers.
        basis: whether the number under it is measured or estimated.
    """

    name: str
    workers: str
    per_s: float
    basis: str


@dataclass
class Plan:
    """The estimate.

    Attributes:
        knowledge: stages of the pipeline, which run at once. trainings: name to hours.
        facts: what to state, by name. limits: what breaks first.
    """

    knowledge: list[Stage]
    trainings: list[tuple[str, float, str]]
    knowledge_hours: float
    dollars: float
    facts: dict[str, str] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)

    @property
    def bottleneck(self) -> Stage:
        return min(self.knowledge, key=lambda stage: stage.per_s)

    @property
    def hours(self) -> float:
        return self.knowledge_hours + sum(hours for _, hours, _ in self.trainings)


def assumptions() -> Assumptions:
    """Return what comes with the package and is not measured: GPUs by data sheet, machines, example prices."""
    packaged = _packaged()
    return Assumptions.model_validate({name: packaged[name] for name in Assumptions.model_fields})


def packaged_constants() -> Constants | None:
    """Return the numbers that come with the package; None if there are only assumptions among them."""
    packaged = _packaged()
    return Constants.model_validate(packaged) if "measured" in packaged else None


def _packaged() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (importlib.resources.files("tmkd_ray") / "plan_constants.json").read_bytes()
    )
    return content


def read_constants(path: str | None) -> Constants:
    """Read the numbers of the model; those of the package if there is no path.

    Raises:
        UserError: there is no such file, or it is not one of `benchmarks/plan_constants.py`; or none were
            measured for the package.
    """
    if path is None:
        packaged = packaged_constants()
        if packaged is None:
            raise UserError(
                "--constants: none were measured for this version of the package; measure them by "
                "`python benchmarks/plan_constants.py --output FILE` and give --constants FILE"
            )
        return packaged
    if not storage.exists(path):
        raise UserError(f"--constants: there is no file {path}")
    try:
        return Constants.model_validate(json.loads(storage.read_bytes(path)))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(where)}: {text}" for where, text in explain(error, Constants))
        raise UserError(f"--constants: {path}: {problems}") from error
    except ValueError as error:
        raise UserError(f"--constants: {path} is not JSON: {error}") from error


def read_nodes(text: str) -> dict[str, int]:
    """Read `views=8,teacher=8,train=2`.

    Raises:
        UserError: another kind, no number, or a kind twice.
    """
    nodes: dict[str, int] = {}
    for part in text.split(","):
        kind, _, count = part.partition("=")
        if kind not in NODE_KINDS or not count.isdecimal() or kind in nodes or int(count) < 1:
            raise UserError(f"--nodes: {text!r}; expected views=N,teacher=N,train=N, each once and at least 1")
        nodes[kind] = int(count)
    missing = [kind for kind in NODE_KINDS if kind not in nodes]
    if missing:
        raise UserError(f"--nodes: {', '.join(missing)} missing in {text!r}")
    return nodes


def make_plan(
    config: ExperimentConfig, nodes: dict[str, int], images: int, classes: int, constants: Constants
) -> Plan:
    """Estimate a run of mode `cached`.

    Args:
        nodes: of each kind. images: of the train split. classes: their number.

    Raises:
        UserError: a model cannot be built or is not known well enough; the mode is another.
    """
    if config.knowledge.mode != "cached":
        raise UserError(f"tmkd plan: knowledge.mode is {config.knowledge.mode}; only cached is planned")
    size, variants, views = config.dataset.image_size, config.knowledge.num_variants, len(config.views)
    visual_flops, width = network_flops(config.teacher.visual.model, size, classes)
    clip_flops, clip_width = clip_cost(config)
    layout = KnowledgeLayout(
        views=tuple(config.views),
        num_variants=variants,
        image_size=size,
        feature_width=width,
        clip_width=clip_width,
        dtype=config.knowledge.dtype,
        image_format=config.knowledge.images,
    )
    kinds = {kind: constants.nodes[kind] for kind in ("views", "teacher", "train")}
    row = layout.bytes_per_image()
    pixels = variants * views * 3 * size**2

    core, driver = constants.core, constants.driver
    cpu_s = core.decode_s.at(size) + variants * core.variant_s.at(size) + row / core.write_bytes_per_s
    cpu_s += (pixels + row) / constants.ray.object_bytes_per_s
    cores = nodes["views"] * kinds["views"].cores
    shard_rows = min(config.knowledge.shard_rows, max(1, _SHARD_BYTES // pixels))
    shards = math.ceil(images / shard_rows)
    teachers = [("visual teacher", visual_flops, config.knowledge.visual.precision)]
    if clip_flops:
        teachers.append(("CLIP", clip_flops, config.knowledge.text.precision))
    seconds, workers, basis = 0.0, "", ""
    for _, flops, precision in teachers:
        speed, workers, basis = _speed(kinds["teacher"], nodes["teacher"], precision, constants)
        seconds += variants * views * flops / speed
    link = min(nodes[kind] * kinds[kind].network_gbit for kind in ("views", "teacher")) * 1e9 / 8
    knowledge = [
        Stage("views and writing", f"{cores} cores", cores / cpu_s, "measured"),
        Stage(" and ".join(name for name, _, _ in teachers), workers, 1 / seconds, basis),
        Stage(
            "pixels over the network", f"{link * 8 / 1e9:g} Gbit/s", link / (pixels + row), "from data sheets"
        ),
        Stage("Ray's shards", "one scheduler", shard_rows / constants.ray.shard_s, "measured"),
    ]
    slowest = min(stage.per_s for stage in knowledge)
    # Every shard's record is read twice when all are done, see `KnowledgeStore.finish`.
    driver_s = images * driver.image_s + shards * driver.shard_s
    driver_s += 2 * shards * constants.store.request_s / _REQUESTS_AT_ONCE
    knowledge_hours = (images / slowest + driver_s + constants.ray.start_s) / 3600

    flops_of = {"the visual teacher": visual_flops, "CLIP": clip_flops}
    fits = [(f"fit of {name}", flops_of[name], fit) for name, fit in fits_of_teachers(config).items()]
    student_flops, _ = network_flops(config.student.model, size, classes)
    runs = len(config.named_methods()) * len(config.seeds or (0,))
    fits.append((f"{runs} student{'s' if runs > 1 else ''}", runs * student_flops, config.training))
    trainings = []
    for name, flops, training in fits:
        speed, _, basis = _speed(kinds["train"], nodes["train"], training.precision, constants)
        hours = images * training.epochs * core.step_over_forward * flops / speed / 3600
        trainings.append((f"{name}, {training.epochs} epochs", hours, basis))

    training_hours = sum(hours for _, hours, _ in trainings)
    dollars = knowledge_hours * sum(nodes[k] * kinds[k].dollars_per_hour for k in ("views", "teacher"))
    dollars += training_hours * nodes["train"] * kinds["train"].dollars_per_hour
    dollars += (knowledge_hours + training_hours) * constants.nodes["head"].dollars_per_hour
    writes = 2 * shards  # a file and its record
    # Of Parquet a file's size, footer and columns for each shard; its record, twice; then by training nodes.
    reads = (images if config.dataset.name == "image_folder" else 3 * shards) + (2 + nodes["train"]) * shards
    dollars += writes / 1000 * constants.prices.dollars_per_1000_writes
    dollars += reads / 1000 * constants.prices.dollars_per_1000_reads
    stored = images * row
    loaded = images * replace(layout, image_format="raw").bytes_per_image()
    plan = Plan(knowledge, trainings, knowledge_hours, dollars)
    plan.facts = {
        "store": f"{_bytes(stored)}, {row / variants:,.0f} bytes an image and variant ({layout.dtype}, images "
        f"{layout.image_format}), ${stored / 1e9 * constants.prices.dollars_per_gb_month:,.0f} a month",
        "shards": f"{shards:,} of {shard_rows} images: {writes:,} objects written, about {reads:,} requests to "
        f"read; manifest {_bytes(shards * driver.manifest_bytes)}",
        "in the memory or on the disk of each training node, decoded": _bytes(loaded),
        "traffic between the stages": f"{_bytes(images * (pixels + row))} of pixels and images",
        "the driver alone": f"{driver_s / 3600:,.2f} hours for the lists of images and shards",
        "nodes": ", ".join(f"{nodes[kind]} × {kinds[kind].machine} ({kind})" for kind in NODE_KINDS),
    }
    plan.limits = _limits(config, nodes, images, plan, loaded, shards, constants)
    return plan


def fits_of_teachers(config: ExperimentConfig) -> dict[str, TrainingConfig]:
    """Return how the teachers that are not given are fitted, by name."""
    fits: dict[str, TrainingConfig] = {}
    if not config.teacher.visual.is_given:
        fits["the visual teacher"] = config.teacher.visual.fit
    if config.teacher.text is not None and config.teacher.text.model is None:
        fits["CLIP"] = config.teacher.text.fit
    return fits


def _speed(node: Node, count: int, precision: str, constants: Constants) -> tuple[float, str, str]:
    """Return operations a second of so many nodes, what does them, and on what ground."""
    if node.gpus == 0:
        cores = count * node.cores
        return cores * constants.core.flops, f"{cores} cores", "measured"
    if node.gpu not in constants.gpus:
        raise UserError(f"--constants: gpus has no {node.gpu!r}, which {node.machine} has")
    gpu = constants.gpus[node.gpu]
    speed = count * node.gpus * getattr(gpu, precision) * gpu.utilisation
    basis = "measured"
    if gpu.is_estimate:
        basis = f"ESTIMATE: {gpu.utilisation:.0%} of {getattr(gpu, precision) / 1e12:g} TFLOP/s"
    return speed, f"{count * node.gpus} × {node.gpu}", basis


def _limits(
    config: ExperimentConfig,
    nodes: dict[str, int],
    images: int,
    plan: Plan,
    loaded: float,
    shards: int,
    constants: Constants,
) -> list[str]:
    """Say what of the machines and of this program such a run would burst, the closest to its limit first."""
    driver, store = constants.driver, constants.store
    head, node = constants.nodes["head"], constants.nodes["train"]
    workers = max(1, config.training.num_workers // nodes["train"])
    head_memory, memory = (machine.memory_gib * 2**30 * _OF_MEMORY for machine in (head, node))
    limits: list[tuple[float, str]] = []

    def limit(used: float, of: float, text: str) -> None:
        if used > of:
            limits.append((used / of, text))

    driver_bytes = images * driver.image_bytes + shards * driver.shard_bytes
    limit(
        driver_bytes,
        head_memory,
        f"the driver: {_bytes(driver_bytes)} for the lists of images and shards, on a head of "
        f"{head.memory_gib:g} GiB: a larger head, or cut the data into parts",
    )
    if config.knowledge.loader == "resident":
        limit(
            workers * loaded,
            memory,
            f"memory for training: {_bytes(loaded)} in each of {workers} workers of a node of "
            f"{node.memory_gib:g} GiB: knowledge.loader=mapped or streaming",
        )
    elif workers * loaded > memory:
        limit(
            loaded,
            0.8 * node.disk_gib * 2**30,
            f"disks for training: the copy of the store, decoded, is {_bytes(loaded)}, and a node's disk "
            f"{node.disk_gib:g} GiB: larger disks, fewer variants, or knowledge.mode streaming",
        )
    for name, fit in fits_of_teachers(config).items():
        pixels = images * 3 * config.dataset.image_size**2
        fitting = max(1, fit.num_workers // nodes["train"])
        limit(
            fitting * pixels,
            memory,
            f"memory for the fit of {name}: {_bytes(pixels)} of images in each of {fitting} workers of a node "
            f"of {node.memory_gib:g} GiB: give it, or fit it on a part (dataset.limit)",
        )
    kept = images * driver.image_kept_bytes
    limit(
        (workers + 1) * kept,
        memory,
        f"the list of images in each process: {_bytes(kept)} × {workers + 1} on a training node of "
        f"{node.memory_gib:g} GiB: cut the data into parts",
    )
    limit(
        driver.manifest_bytes * shards,
        1e9,
        f"the manifest: {_bytes(driver.manifest_bytes * shards)} of JSON, read whole by every process that "
        "opens the store: fewer variants or views, which make larger shards, or cut the data into parts",
    )
    slowest = plan.bottleneck.per_s * shards / images  # shards a second
    folder = config.dataset.name == "image_folder"
    limit(
        plan.bottleneck.per_s if folder else slowest,
        store.reads_per_s,
        f"requests to read: {plan.bottleneck.per_s if folder else slowest:,.0f} a second of "
        f"{store.reads_per_s:,.0f} that the object store answers in one folder: pack the images into Parquet",
    )
    limit(
        2 * slowest,
        store.writes_per_s,
        f"requests to write: {2 * slowest:,.0f} a second of {store.writes_per_s:,.0f} that the object store "
        "answers in one folder",
    )
    return [text for _, text in sorted(limits, reverse=True)]


def network_flops(model: str, image_size: int, classes: int) -> tuple[float, int]:
    """Return floating-point operations (two a multiplication) of one forward pass, and the penultimate width.

    Counted without weights, on PyTorch's meta device.
    """
    task = TaskSpec(tuple(str(label) for label in range(classes)), image_size)
    with torch.device("meta"), torch.no_grad():
        network = build_model(model, task).eval()  # which may try it out: not counted
        with FlopCounterMode(display=False) as counter:
            output = network(torch.empty(1, 3, image_size, image_size))
    return float(counter.get_total_flops()), int(output.feature.shape[-1])


_KNOWN_CLIPS = {
    "openai/clip-vit-base-patch32": (224, 32, 768, 12, 512),
    "openai/clip-vit-base-patch16": (224, 16, 768, 12, 512),
    "openai/clip-vit-large-patch14": (224, 14, 1024, 24, 768),
}
"""Image size, patch, width, layers, embedding (Radford et al. 2021, table 20)."""


def clip_cost(config: ExperimentConfig) -> tuple[float, int | None]:
    """Return operations of CLIP's image tower on one image, and its embedding's width; (0, None) without CLIP.

    Raises:
        UserError: it is neither a folder here nor one of OpenAI's.
    """
    text = config.teacher.text
    if text is None:
        return 0.0, None
    if text.model is None:
        small = text.architecture
        size = small.image_size or config.dataset.image_size
        return (
            vit_flops(size, small.patch_size, small.vision_width, small.vision_layers),
            small.embedding_width,
        )
    if text.model in _KNOWN_CLIPS:
        *shape, width = _KNOWN_CLIPS[text.model]
        return vit_flops(*shape), width
    file = Path(text.model) / "config.json"
    if not file.exists():
        known = ", ".join(_KNOWN_CLIPS)
        raise UserError(f"teacher.text.model: {text.model} is no folder here, nor one of {known}")
    content = json.loads(file.read_text())
    vision = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12}
    vision |= {name: value for name, value in content.get("vision_config", {}).items() if name in vision}
    return vit_flops(*vision.values()), int(content.get("projection_dim", 512))


def vit_flops(image_size: int, patch_size: int, width: int, layers: int) -> float:
    """Return floating-point operations of a vision transformer with MLPs four times as wide.

    A layer on n tokens of width d: 4nd² multiplications for the projections, 2n²d for attention, 8nd² for the
    MLP.
    """
    tokens = (image_size // patch_size) ** 2 + 1
    layer = 12 * tokens * width**2 + 2 * tokens**2 * width
    patches = (tokens - 1) * 3 * patch_size**2 * width
    return 2.0 * (layers * layer + patches)


def format_plan(plan: Plan, images: int, constants: Constants, source: str) -> str:
    """Return the plan as Markdown; `source` says whose constants they are."""
    lines = [
        f"{images:,} images on {plan.facts['nodes']}",
        "",
        "| knowledge, all at once | on | images/s | hours | |",
        "|---|---|---:|---:|---|",
    ]
    for stage in plan.knowledge:
        mark = " ← holds the others back" if stage is plan.bottleneck else ""
        hours = images / stage.per_s / 3600
        lines.append(
            f"| {stage.name} | {stage.workers} | {stage.per_s:,.0f} | {hours:,.2f} | {stage.basis}{mark} |"
        )
    lines += ["", "| then, on the training nodes | hours | |", "|---|---:|---|"]
    lines += [f"| {name} | {hours:,.2f} | {basis} |" for name, hours, basis in plan.trainings]
    lines += [
        "",
        f"- hours: {plan.hours:,.1f}, of which knowledge {plan.knowledge_hours:,.1f}",
        f"- dollars: {plan.dollars:,.0f} ({constants.prices.note})",
    ]
    lines += [f"- {name}: {fact}" for name, fact in plan.facts.items() if name != "nodes"]
    if plan.limits:
        lines += ["- what breaks first:"] + [
            f"  {number}. {text}" for number, text in enumerate(plan.limits, 1)
        ]
    else:
        lines.append("- memory and disks suffice")
    lines.append(f"- constants of {source}: {constants.measured}; GPUs, machines, prices were not measured")
    return "\n".join(lines)


def format_measured(constants: Constants) -> str:
    """Return the measured numbers as a Markdown table, for people."""
    core, ray, driver = constants.core, constants.ray, constants.driver

    def pair(cost: PerSize) -> str:
        return f"{1e6 * cost.at_32:,.3g} / {1e6 * cost.at_224:,.4g} µs"

    rows = [
        ("views: read, decode, store an image of 32 / 224 pixels, one core", pair(core.decode_s)),
        ("views: each variant: augment, three views", pair(core.variant_s)),
        ("writing: Parquet, one core", f"{core.write_bytes_per_s / 1e6:,.0f} MB/s"),
        (
            "teachers without a GPU: ResNet-18 at 224 pixels, float32, one core",
            f"{core.flops / 1e9:,.3g} GFLOP/s",
        ),
        ("a large matrix product on the same core", f"{core.matmul_flops / 1e9:,.3g} GFLOP/s"),
        ("training: a step over its forward pass", f"{core.step_over_forward:.3g} ×"),
        ("Ray: to start three pools", f"{ray.start_s:.3g} s"),
        ("Ray: a shard through three pools that do nothing", f"{1e3 * ray.shard_s:.3g} ms"),
        ("Ray: into the object store and out, one process", f"{ray.object_bytes_per_s / 1e6:,.0f} MB/s"),
        ("driver: to list an image", f"{1e6 * driver.image_s:.3g} µs, {driver.image_bytes:,.0f} bytes at most"),
        ("every process: an image of the list", f"{driver.image_kept_bytes:,.0f} bytes"),
        (
            "driver: to plan a shard and list it",
            f"{1e3 * driver.shard_s:.3g} ms, {driver.shard_bytes:,.0f} bytes at most",
        ),
        ("manifest: a shard", f"{driver.manifest_bytes:,.0f} bytes"),
    ]
    lines = [f"| {constants.measured} | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def format_assumed(constants: Assumptions) -> str:
    """Return what was not measured as a Markdown table, with its source."""
    lines = ["| not measured | | where it is from |", "|---|---|---|"]
    for name, gpu in constants.gpus.items():
        peaks = ", ".join(
            f"{getattr(gpu, kind) / 1e12:g} TFLOP/s in {kind}" for kind in ("float32", "bfloat16", "float16")
        )
        lines.append(f"| {name} | {peaks}; networks reach {gpu.utilisation:.0%} of it | {gpu.source} |")
    for kind, node in constants.nodes.items():
        gpus = f", {node.gpus} × {node.gpu}" if node.gpus else ""
        facts = (
            f"{node.machine}: {node.cores} cores{gpus}, {node.memory_gib:g} GiB, disk {node.disk_gib:g} GiB, "
            f"{node.network_gbit:g} Gbit/s, ${node.dollars_per_hour:g} an hour"
        )
        lines.append(f"| {kind} node | {facts} | {constants.prices.note} |")
    store, prices = constants.store, constants.prices
    facts = (
        f"{store.reads_per_s:,.0f} reads, {store.writes_per_s:,.0f} writes a second in a folder; "
        f"{1e3 * store.request_s:g} ms a small request"
    )
    lines.append(f"| object store | {facts} | {store.source} |")
    facts = (
        f"${prices.dollars_per_gb_month:g} a GB and month, ${prices.dollars_per_1000_writes:g} for 1,000 "
        f"writes, ${prices.dollars_per_1000_reads:g} for 1,000 reads"
    )
    lines.append(f"| object store, prices | {facts} | {prices.note} |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"

"""What a run would take on a cluster: images a second, hours, bytes, dollars, and what holds the rest back.

A model of the road in a dozen numbers (`Constants`), each either measured by `benchmarks/plan_constants.py` or
an estimate that says so. Per stage: work of an image ÷ what the nodes do in a second. Knowledge is a pipeline,
as fast as its slowest stage; trainings come after it, one after the other.
"""

import importlib.resources
import json
import math
from dataclasses import dataclass, field
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

_BACKWARD = 3
"""FLOPs of a training step over those of its forward pass: the backward pass costs twice as much again."""

_ID_CHARACTERS = 24
"""Of a sample's id, held by NumPy at 4 bytes a character, beside 20 bytes of label and place."""

_SHARD_BYTES = 64 * 2**20
"""Of views that travel as one piece, as in the knowledge stage."""


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
    """

    decode_s: PerSize
    variant_s: PerSize
    write_bytes_per_s: float = Field(gt=0)
    flops: float = Field(gt=0)


class RayConstants(Settings):
    """Seconds: to start a pipeline of actors; and of Ray's own for each shard that passes."""

    start_s: float = Field(ge=0)
    shard_s: float = Field(gt=0)


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


class Constants(Settings):
    """The numbers of the model; `note` says where and when they were measured."""

    note: str
    core: CoreConstants
    ray: RayConstants
    gpus: dict[str, Gpu]
    nodes: dict[Literal["head", "views", "teacher", "train"], Node]
    prices: Prices


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


def unmeasured() -> dict[str, Any]:
    """Return the fields of `Constants` that are not measured: GPUs by data sheet, machines, example prices."""
    content: dict[str, Any] = json.loads(
        (importlib.resources.files("tmkd_ray") / "plan_constants.json").read_bytes()
    )
    return content


def read_constants(path: str) -> Constants:
    """Read the numbers of the model.

    Raises:
        UserError: there is no such file, or it is not one of `benchmarks/plan_constants.py`.
    """
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

    core = constants.core
    cpu_s = core.decode_s.at(size) + variants * core.variant_s.at(size) + row / core.write_bytes_per_s
    cores = nodes["views"] * kinds["views"].cores
    shard_rows = min(config.knowledge.shard_rows, max(1, _SHARD_BYTES // pixels))
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
    knowledge_hours = (images / slowest + constants.ray.start_s) / 3600

    fits: list[tuple[str, float, TrainingConfig]] = []
    if config.teacher.visual.checkpoint is None:
        fits.append(("fit of the visual teacher", visual_flops, config.teacher.visual.fit))
    if config.teacher.text is not None and config.teacher.text.model is None:
        fits.append(("fit of CLIP", clip_flops, config.teacher.text.fit))
    student_flops, _ = network_flops(config.student.model, size, classes)
    runs = len(config.named_methods()) * len(config.seeds or (0,))
    fits.append((f"{runs} student{'s' if runs > 1 else ''}", runs * student_flops, config.training))
    trainings = []
    for name, flops, training in fits:
        speed, _, basis = _speed(kinds["train"], nodes["train"], training.precision, constants)
        hours = images * training.epochs * _BACKWARD * flops / speed / 3600
        trainings.append((f"{name}, {training.epochs} epochs", hours, basis))

    training_hours = sum(hours for _, hours, _ in trainings)
    dollars = knowledge_hours * sum(nodes[k] * kinds[k].dollars_per_hour for k in ("views", "teacher"))
    dollars += training_hours * nodes["train"] * kinds["train"].dollars_per_hour
    dollars += (knowledge_hours + training_hours) * constants.nodes["head"].dollars_per_hour
    shards = math.ceil(images / shard_rows)
    writes = 2 * shards  # a file and its record
    dollars += writes / 1000 * constants.prices.dollars_per_1000_writes
    stored = images * row
    plan = Plan(knowledge, trainings, knowledge_hours, dollars)
    plan.facts = {
        "store": f"{_bytes(stored)}, {row / variants:,.0f} bytes an image and variant ({layout.dtype}, images "
        f"{layout.image_format}), ${stored / 1e9 * constants.prices.dollars_per_gb_month:,.0f} a month",
        "shards": f"{shards:,} of {shard_rows} images: {writes:,} objects written",
        "traffic between the stages": f"{_bytes(images * (pixels + row))} of pixels and images",
        "nodes": ", ".join(f"{nodes[kind]} × {kinds[kind].machine} ({kind})" for kind in NODE_KINDS),
    }
    plan.limits = _limits(config, nodes, images, stored, kinds, shards)
    return plan


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
    stored: float,
    kinds: dict[str, Node],
    shards: int,
) -> list[str]:
    """Say what of the machines' memory and disks such a run would burst."""
    limits = []
    node = kinds["train"]
    index = images * (4 * _ID_CHARACTERS + 20)
    workers = max(1, config.training.num_workers // nodes["train"])
    memory = node.memory_gib * 2**30
    if workers * stored > 0.5 * memory:
        limits.append(
            f"the store, {_bytes(stored)}, does not fit the memory of {workers} workers a training node "
            f"({node.memory_gib:g} GiB): knowledge.loader mapped or streaming"
        )
    if stored > 0.8 * node.disk_gib * 2**30:
        limits.append(
            f"nor the disk of a training node ({node.disk_gib:g} GiB), where mapped keeps its copy: larger "
            "disks, fewer variants, knowledge.images=reference, or mode online"
        )
    if (workers + 1) * index > 0.25 * memory:
        limits.append(
            f"the list of samples, {_bytes(index)} in the driver and in each worker, takes too much memory of "
            f"{node.memory_gib:g} GiB: cut the data into parts"
        )
    if shards > 500_000:
        limits.append(
            f"{shards:,} shards are one Ray Data job and one list of objects: cut the data into parts"
        )
    return limits


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


def format_plan(plan: Plan, images: int, constants: Constants) -> str:
    """Return the plan as Markdown."""
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
    lines.append(f"- constants: {constants.note}")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"

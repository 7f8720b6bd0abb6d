"""What each distillation strategy costs: a training step with it, over one with cross-entropy alone.

    python benchmarks/strategies.py [--rounds 7] [--device cpu] [--threads 1]

A step is the student's forward pass, the loss, the backward pass, the optimiser and the strategy's own update;
the teacher's output is there already, as it is when it comes from the knowledge store; the maps that some
strategies need come from a teacher that runs beside the student, whose own time is not counted. The objective
alone (its forward and backward pass, given the student's output) is timed too: it can be too small to be seen
in a step.
Every round times all of them one after the other, so that what else the machine does falls on all alike; a
ratio is the median of the rounds' ratios, a time the median of the rounds' times.
Prints a table, then one JSON object a line.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tmkd_ray.distillers import STRATEGIES, DistillationSpec
from tmkd_ray.models import build_model
from tmkd_ray.objective import Distiller, DistillerConfig
from tmkd_ray.types import ModelOutput, TaskSpec, TeacherOutput

STUDENT, NUM_CLASSES, IMAGE_SIZE, TEACHER_WIDTH, CLIP_WIDTH, NUM_VIEWS = "resnet8x4", 100, 32, 256, 512, 3
NUM_SAMPLES = 50_000
TEACHER_MAPS = ((64, 32, 32), (128, 16, 16), (256, 8, 8))
BASELINE = "cross-entropy"


@dataclass
class Batch:
    images: Tensor
    labels: Tensor
    indices: Tensor
    teacher: TeacherOutput


def draw_batch(size: int, device: torch.device) -> Batch:
    """Return random images, and teacher outputs of the sizes of CIFAR-100 with resnet32x4 and CLIP ViT-B/32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    maps = tuple(normal(size, *shape) for shape in TEACHER_MAPS)
    return Batch(
        images=normal(size, 3, IMAGE_SIZE, IMAGE_SIZE),
        labels=torch.randint(NUM_CLASSES, (size,), generator=generator).to(device),
        indices=torch.randperm(NUM_SAMPLES, generator=generator)[:size].to(device),
        teacher=TeacherOutput(
            logits=4 * normal(size, NUM_CLASSES),
            feature=normal(size, TEACHER_WIDTH).relu(),
            view_weights=torch.softmax(normal(size, NUM_VIEWS), dim=1),
            clip_embedding=F.normalize(normal(size, CLIP_WIDTH), dim=1),
            text_bank=F.normalize(normal(NUM_VIEWS, NUM_CLASSES, CLIP_WIDTH), dim=2),
            text_logits=4 * normal(size, NUM_CLASSES),
            feature_maps=tuple(value.relu() for value in maps),
            preactivation_maps=maps,
        ),
    )


class Case:
    """A student with one objective."""

    def __init__(self, strategy: dict[str, Any] | None, device: torch.device) -> None:
        torch.manual_seed(0)
        task = TaskSpec(tuple(str(number) for number in range(NUM_CLASSES)), IMAGE_SIZE)
        self.student = build_model(STUDENT, task).to(device).train()
        options: dict[str, Any] = {"name": "alone"}
        if strategy is not None:
            options = {"name": "kd", "ce_weight": 1.0, "kd_weight": 1.0, "strategy": strategy}
        spec = DistillationSpec(
            NUM_CLASSES,
            self.student.feature_width,
            TEACHER_WIDTH,
            CLIP_WIDTH,
            NUM_SAMPLES,
            class_counts=(NUM_SAMPLES // NUM_CLASSES,) * NUM_CLASSES,
            student_maps=self.student.map_shapes(IMAGE_SIZE),
            teacher_maps=TEACHER_MAPS,
        )
        self.distiller = Distiller(DistillerConfig.model_validate(options), spec).to(device)
        self.taught = strategy is not None
        parameters = [*self.student.parameters(), *self.distiller.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=True)

    def step(self, batch: Batch) -> None:
        self._descend(batch, self.student(batch.images))
        self.optimizer.step()
        self.distiller.after_step(batch.indices)

    def objective(self, batch: Batch) -> None:
        output = self.output
        leaves = [value.detach().requires_grad_() for value in (output.logits, output.feature)]
        maps = [
            tuple(value.detach().requires_grad_() for value in stages)
            for stages in (output.feature_maps, output.preactivation_maps)
        ]
        self._descend(batch, ModelOutput(*leaves, *maps))

    def _descend(self, batch: Batch, output: ModelOutput) -> None:
        self.output = output
        teacher = batch.teacher if self.taught else None
        loss = self.distiller(output, teacher, batch.labels).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()


def seconds(work: Callable[[Batch], None], batch: Batch, repeats: int) -> float:
    """Return the mean time of one call."""
    _wait(batch.images.device)
    started = time.perf_counter()
    for _ in range(repeats):
        work(batch)
    _wait(batch.images.device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {threads} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="in each round, for each strategy")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    strategies: dict[str, dict[str, Any] | None] = {BASELINE: None}
    strategies |= {f"strategy_{name}": {"name": name} for name in STRATEGIES}
    strategies["strategy_kd_standardized"] = {"name": "kd", "standardize_logits": True}
    cases = {name: Case(strategy, device) for name, strategy in strategies.items()}
    batch = draw_batch(arguments.batch_size, device)
    for case in cases.values():
        seconds(case.step, batch, 2)  # memory is claimed and kernels are chosen at first
    rounds = [
        {
            name: (seconds(case.step, batch, arguments.steps), seconds(case.objective, batch, 10))
            for name, case in cases.items()
        }
        for _ in range(arguments.rounds)
    ]

    facts = {
        "baseline": BASELINE,
        "n": arguments.rounds,
        "student": STUDENT,
        "batch_size": arguments.batch_size,
        "num_classes": NUM_CLASSES,
        "teacher_width": TEACHER_WIDTH,
        "num_samples": NUM_SAMPLES,
        "hardware": hardware(device, arguments.threads),
        "torch": torch.__version__,
    }
    print(f"{STUDENT}, batch {arguments.batch_size}, {facts['hardware']}, {arguments.rounds} rounds")
    print(f"{'':26}{'ms a step':>10}{'ratio':>8}{'least':>8}{'most':>8}{'ms the objective':>18}")
    results = []
    for name in cases:
        ratios = [times[name][0] / times[BASELINE][0] for times in rounds]
        step_ms, objective_ms = (1000 * statistics.median(times[name][i] for times in rounds) for i in (0, 1))
        ratio = statistics.median(ratios)
        print(f"{name:26}{step_ms:10.1f}{ratio:8.3f}{min(ratios):8.3f}{max(ratios):8.3f}{objective_ms:18.2f}")
        times = {"step_ms": round(step_ms, 1), "objective_ms": round(objective_ms, 2)}
        results.append({"name": name, "ratio": round(ratio, 3), **times, **facts})
    for result in results[1:]:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

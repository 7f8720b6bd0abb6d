"""Several optimiser steps on two workers, with half of each batch, are those of one worker with the whole.

One start of two processes serves all strategies; the single steps of every registered strategy within the whole
objective are compared in test_distributed_losses.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from teaching_samples import (
    CLASSES,
    NUM_SAMPLES,
    SPEC,
    STUDENT_WIDTH,
    mapped,
    maps_from,
    normal,
    teacher_output,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tmkd_ray.distillers import STRATEGIES, build_strategy
from tmkd_ray.losses import gather_with_gradient
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

NUM_WORKERS, BATCH, STEPS, PIXELS = 2, 6, 3, 10

# Step sizes that move the weights by some per cent: the published weights are of different orders.
CASES: dict[str, dict[str, Any]] = {
    "dist": {"name": "dist"},
    "dist of z-scores": {"name": "dist", "standardize_logits": True},
    "mlkd": {"name": "mlkd"},
    "mlkd of z-scores": {"name": "mlkd", "standardize_logits": True},
    "kd of z-scores": {"name": "kd", "standardize_logits": True},
    "dkd of z-scores": {"name": "dkd", "standardize_logits": True},
    "richkd": {"name": "richkd"},
    "rkd": {"name": "rkd", "distance_weight": 1.0, "angle_weight": 2.0},
    "pkt": {"name": "pkt", "weight": 100.0},
    "sp": {"name": "sp", "weight": 10.0},
    "vid": {"name": "vid"},
    "crd": {"name": "crd", "embedding_width": 4, "num_negatives": 50, "temperature": 0.5},
    "bkd": {"name": "bkd"},
    "tf_kd": {"name": "tf_kd", "temperature": 0.5},
    "fitnet": {"name": "fitnet", "weight": 1.0},
    "at": {"name": "at"},
    "nst": {"name": "nst"},
    "kdsvd": {"name": "kdsvd", "weight": 10.0},
}
# Workers normalise by their own part of the batch: what they learn differs, but not what they measure.
WITH_BATCH_NORM: dict[str, dict[str, Any]] = {"ofd": {"name": "ofd"}, "reviewkd": {"name": "reviewkd"}}


class Student(nn.Module):
    """Feature and logits by a linear layer each, and a strategy with its heads: what DDP wraps."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(PIXELS, STUDENT_WIDTH)
        self.head = nn.Linear(STUDENT_WIDTH, CLASSES)
        config = STRATEGIES.get(options["name"]).Config.model_validate(options)
        self.strategy = build_strategy(config, SPEC)
        # DDP wants a gradient for every parameter, and some strategies do not read the logits.
        self.head.requires_grad_(self.strategy.trains_classifier)

    def forward(self, images: Tensor, teacher: TeacherOutput, labels: Tensor) -> LossOutput:
        feature = torch.tanh(self.body(images))
        student = ModelOutput(self.head(feature), feature, **maps_from(feature))
        output: LossOutput = self.strategy(student, teacher, labels)
        return output


def train(module: nn.Module, student: Student, rows: slice) -> dict[str, Any]:
    """Losses of each step, and the state after all of them."""
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = normal(generator, BATCH, PIXELS)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        indices = torch.randperm(NUM_SAMPLES, generator=generator)[:BATCH]
        whole = teacher_output(seed=step + 10, batch=BATCH)
        output = module(images[rows], TeacherOutput(**mapped(whole, lambda value: value[rows])), labels[rows])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        student.strategy.after_step(indices[rows])
        losses.append(output.loss.item())
    return {"losses": losses, "state": student.state_dict()}


def gathered_gradient(own: Tensor) -> tuple[Tensor, Tensor]:
    """What is gathered, and the gradient by the own rows of a loss in which all rows meet."""
    own = own.clone().requires_grad_()
    whole = gather_with_gradient(own)
    (whole @ whole.T).pow(3).sum().backward()
    assert own.grad is not None
    return whole.detach(), own.grad


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=NUM_WORKERS)
    rows = slice(rank * BATCH // NUM_WORKERS, (rank + 1) * BATCH // NUM_WORKERS)
    found: dict[str, Any] = {}
    for name, options in (CASES | WITH_BATCH_NORM).items():
        student = Student(options)
        found[name] = train(DistributedDataParallel(student, broadcast_buffers=False), student, rows)
    found["gather"] = gathered_gradient(normal(torch.Generator().manual_seed(6), BATCH, 3)[rows])
    torch.save(found, f"{folder}/worker-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=NUM_WORKERS)
    return [torch.load(folder / f"worker-{rank}.pt", weights_only=True) for rank in range(NUM_WORKERS)]


def test_every_strategy_is_here_or_has_nothing_to_gather() -> None:
    assert {options["name"] for options in CASES.values()} >= set(STRATEGIES) - {
        "feature_mse",
        *WITH_BATCH_NORM,
    }


@pytest.mark.parametrize("case", CASES)
def test_two_workers_train_as_one(workers: list[dict[str, Any]], case: str) -> None:
    student = Student(CASES[case])
    initial = {name: value.clone() for name, value in student.state_dict().items()}
    alone = train(student, student, slice(None))
    each = [worker[case] for worker in workers]
    for step, loss in enumerate(alone["losses"]):
        mean = sum(found["losses"][step] for found in each) / NUM_WORKERS
        assert mean == pytest.approx(loss, rel=1e-4)
    for name, value in alone["state"].items():
        torch.testing.assert_close(each[0]["state"][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(each[0]["state"][name], each[1]["state"][name]), "the same on every worker"
    moved = alone["state"]["body.weight"] - initial["body.weight"]
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("case", WITH_BATCH_NORM)
def test_two_workers_with_batch_norm_stay_the_same(workers: list[dict[str, Any]], case: str) -> None:
    own = [name for name in workers[0][case]["state"] if "running_" in name]
    assert own
    for name, value in workers[0][case]["state"].items():
        assert torch.equal(value, workers[1][case]["state"][name]) == (name not in own)


def test_two_workers_measure_the_margins_as_one(workers: list[dict[str, Any]]) -> None:
    student = Student(WITH_BATCH_NORM["ofd"])
    alone = train(student, student, slice(None))["state"]["strategy.responses"]
    for worker in workers:
        torch.testing.assert_close(worker["ofd"]["state"]["strategy.responses"], alone)


def test_the_gathered_gradient_is_shared_out_among_the_workers(workers: list[dict[str, Any]]) -> None:
    """Each worker's is its rows of the whole, times the number of workers: DDP divides by it."""
    whole = normal(torch.Generator().manual_seed(6), BATCH, 3)
    _, gradient = gathered_gradient(whole)
    for rank, worker in enumerate(workers):
        rows = slice(rank * BATCH // NUM_WORKERS, (rank + 1) * BATCH // NUM_WORKERS)
        gathered, own = worker["gather"]
        assert torch.equal(gathered, whole)
        torch.testing.assert_close(own, NUM_WORKERS * gradient[rows])

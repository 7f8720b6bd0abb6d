"""DOT against its update rule in NumPy, against SGD, through a checkpoint and over two workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reference_formulas import Array
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tmkd_ray.training.dot import DOT
from tmkd_ray.types import LossOutput

NUM_WORKERS, BATCH, WIDTH, STEPS = 2, 6, 4, 5
RATE, MOMENTUM, DELTA, DECAY = 0.1, 0.8, 0.15, 0.05


class Student(nn.Module):
    """A body that both parts of the loss reach, a classifier and a distillation head that one reaches each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(3, WIDTH)
        self.classifier = nn.Linear(WIDTH, 2, bias=False)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)

    def forward(self, images: Tensor) -> LossOutput:
        feature = torch.tanh(self.body(images))
        task = 0.7 * self.classifier(feature).square().mean()
        terms = (1.3 * (self.head(feature) - 1).square().mean(), 0.4 * (feature - 0.5).square().mean())
        return LossOutput(task + terms[0] + terms[1], task=task, distillation=terms)


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step))


def optimizer_of(student: Student, **options: float) -> DOT:
    chosen = {"momentum": MOMENTUM, "delta": DELTA, "weight_decay": DECAY} | options
    return DOT([p for p in student.parameters() if p.requires_grad], RATE, **chosen)


def weights(student: Student) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.named_parameters()}


def train(student: Student, optimizer: DOT, steps: range = range(STEPS)) -> None:
    for step in steps:
        optimizer.backward(student(batch(step)))
        optimizer.step()


def gradients(student: Student, step: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Of the task and of the distillation, by name, each from a forward pass of its own."""
    found = []
    for part in (lambda loss: loss.task, lambda loss: sum(loss.distillation)):
        part(student(batch(step))).backward()
        reached = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        found.append({name: gradient.double().numpy() for name, gradient in reached.items()})
        student.zero_grad()
    return found[0], found[1]


def test_the_update_is_the_formula() -> None:
    student, replica = Student(), Student()
    optimizer = optimizer_of(student)
    value = {name: p.double().numpy() for name, p in weights(student).items()}
    task_velocity = {name: np.zeros_like(v) for name, v in value.items()}
    distillation_velocity = {name: np.zeros_like(v) for name, v in value.items()}
    for step in range(STEPS):
        with torch.no_grad():
            for name, parameter in replica.named_parameters():
                parameter.copy_(torch.from_numpy(value[name]))
        of_task, of_distillation = gradients(replica, step)
        assert of_task.keys() ^ of_distillation.keys() == {"classifier.weight", "head.weight"}
        for name, theta in value.items():
            if name in of_task and name in of_distillation:
                task_momentum, distillation_momentum, decays = MOMENTUM - DELTA, MOMENTUM + DELTA, 0.0
            else:
                task_momentum = distillation_momentum = MOMENTUM
                decays = DECAY
            move = np.zeros_like(theta)
            if name in of_task:
                task_velocity[name] = task_momentum * task_velocity[name] + of_task[name] + DECAY * theta
                move += task_velocity[name]
            if name in of_distillation:
                distillation_velocity[name] = (
                    distillation_momentum * distillation_velocity[name] + of_distillation[name] + decays * theta
                )
                move += distillation_velocity[name]
            value[name] = theta - RATE * move

        train(student, optimizer, range(step, step + 1))
        for name, parameter in student.named_parameters():
            np.testing.assert_allclose(
                parameter.detach().numpy(), value[name], rtol=1e-4, atol=1e-6, err_msg=name
            )


def test_without_delta_it_is_sgd_on_the_whole_loss() -> None:
    student, other = Student(), Student()
    train(student, optimizer_of(student, delta=0.0))
    sgd = torch.optim.SGD(other.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    for step in range(STEPS):
        sgd.zero_grad()
        other(batch(step)).loss.backward()
        sgd.step()
    torch.testing.assert_close(weights(student), weights(other), rtol=1e-5, atol=1e-6)
    train(other := Student(), optimizer_of(other))
    assert (weights(student)["body.weight"] - weights(other)["body.weight"]).abs().max() > 1e-3


def test_it_follows_the_learning_rate_of_its_groups() -> None:
    student = Student()
    optimizer = optimizer_of(student)
    before = weights(student)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(student, optimizer)
    torch.testing.assert_close(weights(student), before, rtol=0, atol=0)


def test_it_goes_on_from_its_state() -> None:
    whole, first = Student(), Student()
    train(whole, optimizer_of(whole))
    optimizer = optimizer_of(first)
    train(first, optimizer, range(2))
    second = Student()
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second, momentum=0.5, delta=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_earlier_gradients_are_forgotten() -> None:
    student, other = Student(), Student()
    optimizer = optimizer_of(student)
    optimizer.backward(student(batch(7)))
    train(student, optimizer)
    train(other, optimizer_of(other))
    torch.testing.assert_close(weights(student), weights(other), rtol=0, atol=0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in student.parameters())
    before = weights(student)
    optimizer.step()
    torch.testing.assert_close(weights(student), before, rtol=0, atol=0)


@pytest.mark.parametrize("max_norm", [0.05, 1e3])
def test_clipping_is_of_the_sum_of_both(max_norm: float) -> None:
    student, other = Student(), Student()
    optimizer = optimizer_of(student, momentum=0.0, delta=0.0, weight_decay=0.0)
    optimizer.backward(student(batch(0)))
    norm = optimizer.clip_gradients(max_norm)
    optimizer.step()
    sgd = torch.optim.SGD(other.parameters(), lr=RATE)
    other(batch(0)).loss.backward()
    expected = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    sgd.step()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(weights(student), weights(other), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("missing", ["task", "distillation"])
def test_both_parts_are_needed(missing: str) -> None:
    student = Student()
    loss = student(batch(0))
    setattr(loss, missing, None if missing == "task" else ())
    with pytest.raises(AssertionError, match=f"no {missing} beside"):
        optimizer_of(student).backward(loss)


@pytest.mark.parametrize("delta", [0.2, 0.9])
def test_the_larger_momentum_stays_below_one(delta: float) -> None:
    with pytest.raises(AssertionError):
        optimizer_of(Student(), momentum=0.8, delta=delta)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=NUM_WORKERS)
    student = Student()
    wrapped = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = optimizer_of(student)
    size = BATCH // NUM_WORKERS
    for step in range(STEPS):
        with wrapped.no_sync():
            output = wrapped(batch(step)[rank * size : (rank + 1) * size])
        optimizer.backward(output)
        optimizer.step()
    torch.save(student.state_dict(), f"{folder}/worker-{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=NUM_WORKERS)
    each: list[dict[str, Any]] = [
        torch.load(tmp_path / f"worker-{rank}.pt", weights_only=True) for rank in range(NUM_WORKERS)
    ]
    alone = Student()
    train(alone, optimizer_of(alone))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(each[0][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(each[0][name], each[1][name])

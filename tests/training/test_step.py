"""A step: the same gradient in micro-batches, in another memory layout, compiled; it waits for no GPU."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_samples import (
    TinyClassifier,
    assert_same_weights,
    clip_task,
    constants,
    interrupt,
    knowledge,
    run,
    student_task,
    timeless,
    training,
)

from tmkd_ray.errors import UserError
from tmkd_ray.models import build_model
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loader import Batch
from tmkd_ray.training.step import TrainStep, micro_batches, uses_channels_last
from tmkd_ray.types import Knowledge, TaskSpec


def resnet8() -> Any:
    return build_model("resnet8", TaskSpec(tuple("0123456789"), 16))


# Micro-batches ------------------------------------------------------------------------------------


def batch_of(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randint(256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8),
        torch.arange(count),
        torch.arange(count) + 100,
        Knowledge(
            torch.randn(count, 2, 5), None, (torch.randn(count, 2, 3, 4, 4), torch.randn(count, 2, 6, 2, 2))
        ),
    )


@pytest.mark.parametrize(
    ("count", "parts", "sizes"), [(8, 2, [4, 4]), (8, 3, [2, 3, 3]), (3, 5, [1, 1, 1]), (4, 1, [4])]
)
def test_micro_batches_are_the_batch(count: int, parts: int, sizes: list[int]) -> None:
    batch = batch_of(count)
    found = micro_batches(batch, parts)
    assert [len(part.labels) for part in found] == sizes
    for field in ("images", "labels", "indices"):
        assert torch.equal(torch.cat([getattr(part, field) for part in found]), getattr(batch, field))
    assert batch.knowledge is not None
    assert torch.equal(torch.cat([part.knowledge.feature for part in found]), batch.knowledge.feature)
    assert all(part.knowledge.clip_embedding is None for part in found)
    for stage, maps in enumerate(batch.knowledge.feature_maps or ()):
        assert torch.equal(torch.cat([part.knowledge.feature_maps[stage] for part in found]), maps)


@pytest.mark.parametrize("parts", [2, 3, 5, 16])
def test_micro_batches_have_the_gradient_of_the_batch(parts: int, tmp_path: Path) -> None:
    """Up to rounding, after clipping too; each sample counts alike in parts of unequal size."""
    weights, histories = [], []
    for number in (1, parts):
        config = training(gradient_accumulation=number, max_gradient_norm=1.0)
        outcome = run(student_task(config, "kd"), config, tmp_path / str(number))
        weights.append(outcome.weights)
        histories.append(timeless(outcome.history))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
    for found, expected in zip(histories[1], histories[0], strict=True):
        assert found.pop("terms") == pytest.approx(expected.pop("terms"), rel=1e-4)
        assert found == pytest.approx(expected, rel=1e-4)


def test_micro_batches_and_a_memory_bank(tmp_path: Path) -> None:
    """Each micro-batch moves its own rows."""
    distiller = {"name": "kd", "strategy": {"name": "crd", "embedding_width": 8, "num_negatives": 64}}
    config = training(epochs=1, gradient_accumulation=4)
    task = student_task(config, distiller)
    run(task, config, tmp_path)
    strategy: Any = task.module.distiller.strategy
    assert strategy.step == 2 * 4
    seen = torch.cat([batch.indices for batch in task.batches(0, PlainContext(tmp_path))])
    assert (strategy.bank_labels != -1).nonzero().flatten().tolist() == sorted(seen.tolist())


def test_clip_in_micro_batches(tmp_path: Path) -> None:
    config = training(epochs=1, gradient_accumulation=2, optimizer="adamw", learning_rate=1e-3)
    first = run(clip_task(config), config, tmp_path / "0")
    assert_same_weights(run(clip_task(config), config, tmp_path / "1").weights, first.weights)


# Memory layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, "cpu", True),
        ({}, "cuda", False),
        ({"precision": "bfloat16"}, "cuda", True),
        ({"precision": "float16"}, "cuda", True),
        ({"channels_last": False}, "cpu", False),
        ({"channels_last": True}, "cuda", True),
    ],
)
def test_where_the_layout_pays(options: dict[str, Any], device: str, expected: bool) -> None:
    assert uses_channels_last(training(**options), torch.device(device)) == expected


def test_layouts_learn_the_same(tmp_path: Path) -> None:
    weights = {}
    for layout in (True, False):
        config = training(channels_last=layout, epochs=2)
        task = student_task(config, "kd", resnet8)
        weights[layout] = run(task, config, tmp_path / str(layout)).weights
        kernel: Any = task.kept.get_submodule("layer1.0.conv1").weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) == layout
        assert kernel.is_contiguous() != layout
        task.save(str(tmp_path / str(layout)), weights[layout])
    for name, value in weights[True].items():
        torch.testing.assert_close(value, weights[False][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_in_another_layout(optimizer: str, tmp_path: Path) -> None:
    """The fused optimisers read momentum by its place in memory: it must come to lie as the weights do."""
    options = {"optimizer": optimizer, "learning_rate": 0.01, "epochs": 4}
    first, other = training(**options, channels_last=False), training(**options, channels_last=True)
    expected = run(student_task(first, "kd", resnet8), first, tmp_path / "whole")
    interrupt(student_task(first, "kd", resnet8), first, tmp_path / "broken", epoch=2)
    resumed = run(student_task(other, "kd", resnet8), other, tmp_path / "broken")
    for found, record in zip(resumed.history, expected.history, strict=True):
        assert found.loss == pytest.approx(record.loss, rel=1e-3)
    for name, value in expected.weights.items():
        torch.testing.assert_close(resumed.weights[name], value, rtol=1e-2, atol=1e-3)


# Compilation --------------------------------------------------------------------------------------


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights up to rounding, under the same names, in checkpoints too; evaluated as they are."""
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor, "compile_threads", 1)  # a pool of them takes longer to start
    plain, compiled = training(epochs=2), training(epochs=2, compile=True, ema_decay=0.9)
    expected = run(student_task(plain, "kd"), plain, tmp_path / "plain")
    task = student_task(compiled, "kd")
    called = []
    task.kept.register_forward_hook(lambda *_: called.append(torch.compiler.is_compiling()))
    outcome = run(task, compiled, tmp_path / "compiled")
    assert list(outcome.weights) == list(expected.weights)
    for name, value in student_task(plain, "kd").kept.state_dict().items():
        assert outcome.weights[name].shape == value.shape
    for name, value in task.module.student.state_dict().items():
        torch.testing.assert_close(value, expected.weights[name], rtol=1e-3, atol=1e-4)
    assert True in called, "it was compiled"
    assert False in called, "validation was not"
    # A checkpoint of it serves an uncompiled training.
    again = run(student_task(plain, "kd"), training(epochs=2, ema_decay=0.9), tmp_path / "compiled")
    assert_same_weights(again.weights, outcome.weights)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = training(epochs=1, compile=True, batch_size=12)
    with pytest.raises(UserError, match=r"set training\.compile=false"):
        run(student_task(config, "alone"), config, tmp_path)
    torch._dynamo.reset()


# What a step does ---------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU: values read into Python, tensors made from Python's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw", "max_gradient_norm": 1.0},
        {"ema_decay": 0.9, "gradient_accumulation": 2, "precision": "bfloat16"},
    ],
)
@pytest.mark.parametrize("distiller", ["alone", "kd", "tmkd"])
def test_a_step_does_not_wait(options: dict[str, Any], distiller: str, tmp_path: Path) -> None:
    config = training(**options)
    context = PlainContext(tmp_path)
    task = student_task(config, distiller, resnet8)
    step = TrainStep(task, config, context)
    step.module.train()
    batch = next(iter(task.batches(0, context)))
    step(batch, 0.0)  # the optimiser's state is made in the first one
    with NoWaiting():
        step(batch, 0.5)


def test_sums(tmp_path: Path) -> None:
    """Over the batch: the loss, its terms, right predictions, samples."""
    assert constants() is not None
    config = training()
    task = student_task(config, "kd", TinyClassifier, knowledge(0, 40))
    context = PlainContext(tmp_path)
    batch = next(iter(task.batches(0, context)))
    with torch.no_grad():
        output = task.module(batch)
    step = TrainStep(task, config, context)
    row = step(batch, 0.0)
    assert row.dtype == torch.float64
    assert step.terms == ["ce", "kd"]
    expected = [output.loss.loss, output.loss.terms["ce"], output.loss.terms["kd"]]
    assert row[:3].tolist() == pytest.approx([16 * float(value) for value in expected], rel=1e-5)
    assert row[3:].tolist() == [float(output.correct), 16.0]


def test_a_batch_that_is_no_dataclass_goes_whole() -> None:
    @dataclasses.dataclass
    class Named:
        labels: Tensor
        name: str
        module: nn.Module

    named = Named(torch.arange(4), "name", nn.Identity())
    first, second = micro_batches(named, 2)
    assert (first.name, second.name) == ("name", "name")
    assert first.module is second.module is named.module

    class Plain:
        labels = torch.arange(4)

    plain = Plain()
    assert micro_batches(plain, 1) == [plain]

"""How long students and teachers take: latency of one image, throughput of many, side by side.

The contestants take turns in every round, in another order each time, so that what else the machine does
meanwhile meets all of them. Reported are medians over the rounds, with quartiles.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tmkd_ray.export.record import ExportRecord

_MIN_SAMPLE_S = 0.02
"""A measurement repeats what is measured for so long, lest the clock's own time be measured."""

_WARMUP_S = 0.3


@dataclass(frozen=True)
class Contestant:
    """A network as one engine runs it.

    Attributes:
        name: of the network, for people.
        engine: PyTorch, ONNX Runtime …
        run: normalised float32 [B, 3, H, W] on `device`; returns when the outputs are there.
        flops: floating-point operations for an image, a multiply-add as two; None where they cannot be counted.
    """

    name: str
    engine: str
    run: Callable[[Tensor], object]
    record: ExportRecord
    device: str = "cpu"
    flops: int | None = None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Speed:
    """What was measured of a contestant.

    Attributes:
        latency_ms: of a batch of one.
        images_per_second: of a batch of `batch_size`.
    """

    contestant: Contestant
    batch_size: int
    latency_ms: Spread
    images_per_second: Spread

    @property
    def accuracy_per_ms(self) -> float | None:
        """Accuracy in percent by millisecond of latency; None where the accuracy is not known."""
        known = self.contestant.record.accuracy()
        return None if known is None else 100 * known[0] / self.latency_ms.median


@torch.no_grad()
def count_flops(network: nn.Module, image_size: int) -> int:
    """Return the floating-point operations for one image, a multiply-add as two (`torch.utils.flop_counter`).

    Counted are matrix products, convolutions and attention, which are nearly all of it.
    """
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


@torch.inference_mode()
def measure_speeds(
    contestants: list[Contestant],
    batch_size: int,
    num_rounds: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[Speed]:
    """Measure all of them, in the order given.

    Args:
        progress: wraps the rounds, to show how far they are.
    """
    inputs = {
        (index, size): torch.randn(size, 3, each.record.image_size, each.record.image_size, device=each.device)
        for index, each in enumerate(contestants)
        for size in (1, batch_size)
    }
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in inputs}
    repeats = {key: _warm_up(contestants[key[0]].run, images) for key, images in inputs.items()}
    order = list(inputs)
    generator = random.Random(0)
    for _ in progress(range(num_rounds)):
        generator.shuffle(order)
        for key in order:
            run, images = contestants[key[0]].run, inputs[key]
            started = time.perf_counter()
            for _ in range(repeats[key]):
                run(images)
            seconds[key].append((time.perf_counter() - started) / repeats[key])
    return [
        Speed(
            contestant,
            batch_size,
            Spread.of([1000 * value for value in seconds[index, 1]]),
            Spread.of([batch_size / value for value in seconds[index, batch_size]]),
        )
        for index, contestant in enumerate(contestants)
    ]


def _warm_up(run: Callable[[Tensor], object], images: Tensor) -> int:
    """Run for a moment; return how many calls make a measurement."""
    calls, started = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - started < _WARMUP_S:
        run(images)
        calls += 1
    # The first calls, which compile and allocate, are in this mean: it is rather too long.
    mean = (time.perf_counter() - started) / calls
    return max(1, round(_MIN_SAMPLE_S / mean))

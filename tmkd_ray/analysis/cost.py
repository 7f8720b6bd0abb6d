"""What a prediction costs: floating-point operations and time."""

import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_WARM_UP = 5
_MIN_RUNS = 10
_MAX_RUNS = 200


def count_flops(module: nn.Module, images: torch.Tensor) -> int:
    """Return the floating-point operations of one forward pass; a multiplication and an addition are two.

    Counted are matrix products, convolutions and attention, as torch's counter does; what is done element by
    element is left out.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images)
    return int(counter.get_total_flops())


@torch.inference_mode()
def measure_latency(module: nn.Module, images: torch.Tensor, budget_s: float = 1.0) -> float:
    """Return the median seconds of a forward pass of these images, after a warm-up.

    Args:
        budget_s: about how long to measure; at least `_MIN_RUNS` passes.
    """

    def once() -> float:
        started = time.perf_counter()
        module(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - started

    for _ in range(_WARM_UP):
        once()
    seconds = [once() for _ in range(_MIN_RUNS)]
    more = int((budget_s - sum(seconds)) / max(statistics.median(seconds), 1e-9))
    seconds += [once() for _ in range(max(0, min(more, _MAX_RUNS - _MIN_RUNS)))]
    return statistics.median(seconds)

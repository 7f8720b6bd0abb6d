"""Moving averages of weights, and means of batch statistics over workers."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tmkd_ray.training.context import WorkerContext


class WeightAverage:
    """Exponential moving average of a network's weights and batch statistics, to be evaluated and kept.

    After the n-th step it becomes `d·average + (1 - d)·weights` with `d = min(decay, (1 + n) / (10 + n))`: the
    smaller decay of the first steps forgets the initial weights. Sources: Polyak & Juditsky 1992,
    "Acceleration of stochastic approximation by averaging"; Tarvainen & Valpola 2017, "Mean teachers are better
    role models", arXiv 1703.01780. What is no floating-point number (the count of batches) is not averaged.

    Args:
        network: on its device, in its memory layout; its tensors must stay where they are.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.decay = decay
        self.steps = 0
        state = {name: value.detach() for name, value in network.state_dict().items()}
        self.names = [name for name, value in state.items() if value.is_floating_point()]
        self.live = [state[name] for name in self.names]
        self.average = [value.clone() for value in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.live, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights for a while."""
        raw = [value.clone() for value in self.live]
        try:
            _copy(self.live, self.average)
            yield
        finally:
            _copy(self.live, raw)

    def statistics(self) -> list[Tensor]:
        """Return the averages of the running means and variances."""
        chosen = set(_statistic_names(self.network))
        return [value for name, value in zip(self.names, self.average, strict=True) if name in chosen]

    def state_dict(self) -> dict[str, Tensor]:
        values = dict(zip(self.names, self.average, strict=True))
        return {"steps": torch.tensor(self.steps), **{f"average.{k}": v for k, v in values.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        _copy(self.average, [state[f"average.{name}"] for name in self.names])


def batch_statistics(module: nn.Module) -> list[Tensor]:
    """Return the running means and variances of batch normalisation, which each worker has its own of."""
    state = module.state_dict()
    return [state[name] for name in _statistic_names(module)]


@torch.no_grad()
def mean_over_workers(values: Sequence[Tensor], context: WorkerContext) -> None:
    """Replace tensors of one dtype by their means over the workers."""
    if context.world_size == 1 or not values:
        return
    flat = torch.cat([value.flatten() for value in values])
    flat = context.reduce_sum(flat) / context.world_size
    parts = torch.split(flat, [value.numel() for value in values])
    _copy(values, [part.view_as(value) for part, value in zip(parts, values, strict=True)])


def _statistic_names(module: nn.Module) -> list[str]:
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for name in ("running_mean", "running_var")
        if getattr(layer, name) is not None
    ]


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)

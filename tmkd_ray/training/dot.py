"""DOT: Zhao, Cui, Song, Liang 2023, "DOT: a distillation-oriented trainer", ICCV, arXiv 2307.08436.

In the training loop, in place of `loss.backward()`, clipping and the step of another optimiser:

    with wrapped.no_sync():              # where DDP wraps the module: it allows one backward pass only
        output = wrapped(batch)
    optimizer.backward(output.loss)      # two backward passes; averages over the workers
    optimizer.clip_gradients(max_norm)   # if wanted
    optimizer.step()

There is no gradient scaling, so float16 is out; bfloat16 and float32 need none.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tmkd_ray.types import LossOutput


class DOT(torch.optim.Optimizer):
    """SGD that keeps apart the gradients of the task and of the distillation, each with a momentum of its own.

        v_task ← (μ - Δ) v_task + g_task + λ θ
        v_distillation ← (μ + Δ) v_distillation + g_distillation
        θ ← θ - η (v_task + v_distillation)

    A parameter that only one of the two reaches, such as a strategy's head, has the momentum μ, as in the
    authors' code. With Δ = 0 this is SGD.

    Args:
        learning_rate: η. momentum: μ. weight_decay: λ.
        delta: Δ; the authors take 0.075 on CIFAR-100 and 0.09 on ImageNet.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        learning_rate: float,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        assert 0 <= momentum - delta <= momentum + delta < 1, (momentum, delta)
        options = {"lr": learning_rate, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        super().__init__(parameters, options)
        self._distillation: dict[Tensor, Tensor] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget both gradients."""
        super().zero_grad(set_to_none=True)
        self._distillation = {}

    def backward(self, loss: LossOutput) -> None:
        """Compute both gradients, and average them over the workers. Earlier ones are forgotten.

        Afterwards `parameter.grad` is the task's.

        Args:
            loss: with both parts.
        """
        assert loss.task is not None, "no task beside the distillation"
        assert loss.distillation, "no distillation beside the task"
        self.zero_grad()
        torch.stack(loss.distillation).sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        self._distillation = {p: p.grad for p in self._parameters() if p.grad is not None}
        super().zero_grad(set_to_none=True)
        loss.task.backward()  # type: ignore[no-untyped-call]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._average_over_workers()

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale both gradients alike, so that their sum is no longer than `max_norm`; return its length."""
        each = [parts for p in self._parameters() if (parts := self._gradients_of(p))]
        sums = [parts[0] if len(parts) == 1 else parts[0] + parts[1] for parts in each]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(sums))))
        torch._foreach_mul_(self._all_gradients(), (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters by the gradients of the last `backward`."""
        for group in self.param_groups:
            momentum, delta, weight_decay = group["momentum"], group["delta"], group["weight_decay"]
            task = {p: p.grad for p in group["params"] if p.grad is not None}
            distilled = {p: self._distillation[p] for p in group["params"] if p in self._distillation}
            both = task.keys() & distilled.keys()
            for part, gradients, own_momentum, own_decay in (
                ("task", task, momentum - delta, weight_decay),
                ("distillation", distilled, momentum + delta, 0.0),
            ):
                shared = {p: g for p, g in gradients.items() if p in both}
                alone = {p: g for p, g in gradients.items() if p not in both}
                self._move(shared, part, own_momentum, own_decay, group["lr"])
                self._move(alone, part, momentum, weight_decay, group["lr"])

    def _move(
        self,
        gradients: dict[Tensor, Tensor],
        part: str,
        momentum: float,
        weight_decay: float,
        learning_rate: float,
    ) -> None:
        """Update the velocities of one part of the loss, and the parameters by them."""
        if not gradients:
            return
        parameters = list(gradients)
        for parameter in parameters:
            if part not in self.state[parameter]:
                self.state[parameter][part] = torch.zeros_like(parameter)
        velocities = [self.state[parameter][part] for parameter in parameters]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, list(gradients.values()))
        if weight_decay:
            torch._foreach_add_(velocities, parameters, alpha=weight_decay)
        torch._foreach_add_(parameters, velocities, alpha=-learning_rate)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _gradients_of(self, parameter: Tensor) -> list[Tensor]:
        return [g for g in (parameter.grad, self._distillation.get(parameter)) if g is not None]

    def _all_gradients(self) -> list[Tensor]:
        return [gradient for parameter in self._parameters() for gradient in self._gradients_of(parameter)]

    @torch.no_grad()
    def _average_over_workers(self) -> None:
        gradients = self._all_gradients()
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])

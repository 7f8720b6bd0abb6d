"""Batch normalisation with statistics for each view, and weights that all views share.

A network that was trained on photographs normalises edge maps by the mean and variance of photographs. Here
every view has a mean and a variance of its own (AdaBN: Li et al. 2017, "Revisiting batch normalization for
practical domain adaptation", arXiv 1603.04779); scale, shift and all other weights stay one for all views. They
are either estimated for a trained network (`estimate_statistics`) or kept apart while it is trained on mixed
batches, each view's part normalised by itself (Chang et al. 2019, arXiv 1906.03950; Xie et al. 2020, arXiv
1911.09665; there scale and shift are apart as well).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tmkd_ray.errors import UserError


class _Selection:
    """Of which view the samples of a batch are, one for all layers of a network.

    Attributes:
        counts: consecutive samples of each view, in the order of the views; None: all are of the first view.
    """

    def __init__(self, num_views: int) -> None:
        self.num_views = num_views
        self.counts: tuple[int, ...] | None = None


class ViewBatchNorm(_BatchNorm):
    """A batch normalisation whose running mean and variance are [V, channels].

    Its tensors have the names of those of the layer it takes the place of. In training each view's part of the
    batch is normalised by its own mean and variance; a part of a single value per channel, which has no
    variance, by the running ones.
    """

    def __init__(self, layer: _BatchNorm, selection: _Selection) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine)
        self.weight, self.bias = layer.weight, layer.bias
        views = selection.num_views
        self.running_mean = layer.running_mean.repeat(views, 1)
        self.running_var = layer.running_var.repeat(views, 1)
        assert layer.num_batches_tracked is not None
        self.num_batches_tracked = layer.num_batches_tracked.repeat(views)
        self.selection = selection
        self.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any: the layer that this takes the place of was given the same."""

    def forward(self, input: Tensor) -> Tensor:
        counts = self.selection.counts
        if counts is None:
            return self._normalize(input, 0)
        assert sum(counts) == len(input), "the samples are not those whose views were told"
        if max(counts) == len(input):
            return self._normalize(input, counts.index(len(input)))
        parts = torch.split(input, list(counts))
        return torch.cat([self._normalize(part, view) for view, part in enumerate(parts) if len(part)])

    def _normalize(self, input: Tensor, view: int) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        training = self.training and input.numel() > input.shape[1]
        momentum = self.momentum
        if training:
            self.num_batches_tracked[view] += 1
            if momentum is None:  # the plain mean of all batches
                momentum = 1.0 / float(self.num_batches_tracked[view])
        return F.batch_norm(
            input,
            self.running_mean[view],
            self.running_var[view],
            self.weight,
            self.bias,
            training,
            0.0 if momentum is None else momentum,
            self.eps,
        )


def use_view_statistics(model: nn.Module, num_views: int) -> None:
    """Give every batch normalisation of `model` statistics for each view; all begin as those it has.

    Raises:
        UserError: it has no batch normalisation.
    """
    selection = _Selection(num_views)
    made: dict[int, ViewBatchNorm] = {}  # a layer may stand in several places
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                if id(layer) not in made:
                    made[id(layer)] = ViewBatchNorm(layer, selection)
                setattr(parent, name, made[id(layer)])
    if not made:
        raise UserError("the model has no batch normalisation, so it has no statistics to keep for each view")


def num_view_statistics(model: nn.Module) -> int | None:
    """Return V where the model has statistics for each view, else None."""
    layer = next(iter(_layers(model)), None)
    return None if layer is None else layer.selection.num_views


@contextlib.contextmanager
def samples_of_views(model: nn.Module, counts: Sequence[int]) -> Iterator[None]:
    """Tell `model` of which view the samples are: so many consecutive ones of each view, in their order."""
    selection = _layers(model)[0].selection
    assert len(counts) == selection.num_views
    before, selection.counts = selection.counts, tuple(counts)
    try:
        yield
    finally:
        selection.counts = before


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor], view: int) -> None:
    """Replace the statistics of one view by those of the images in `batches`; no weight is changed.

    Each layer is given batches that the layers before it normalised by the batch's own statistics, as in
    training. Its mean is that of all values it was given, its variance that about this mean (the aggregation of
    Wu & Johnson 2021, arXiv 2105.07576, §3.2), so neither depends on how the images fell into batches but
    through the layers before.

    Args:
        batches: of normalised float images [B, 3, H, W] of this view.
    """
    layers = _layers(model)
    count = dict.fromkeys(layers, 0)
    sums = {layer: torch.zeros(2, layer.num_features, dtype=torch.float64) for layer in layers}

    def note(layer: ViewBatchNorm, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].detach().transpose(0, 1).flatten(1).double()
        count[layer] += values.shape[1]
        sums[layer] += torch.stack([values.sum(dim=1), values.square().sum(dim=1)]).cpu()

    was_training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note).remove)
            layer.train()  # dropout and the like are not
        for images_BCHW in batches:
            counts = [0] * layer.selection.num_views
            counts[view] = len(images_BCHW)
            with samples_of_views(model, counts):
                model(images_BCHW)
    for layer in layers:
        mean, mean_square = sums[layer] / count[layer]
        variance = (mean_square - mean.square()).clamp(min=0) * count[layer] / max(count[layer] - 1, 1)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean[view] = mean
        layer.running_var[view] = variance
    model.train(was_training)


def _layers(model: nn.Module) -> list[ViewBatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, ViewBatchNorm)]

"""What several of the CIFAR networks are made of."""

from collections.abc import Mapping

from torch import Tensor, nn


def conv3x3(in_width: int, out_width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 3×3 convolution without bias that keeps the size, or halves it with stride 2."""
    return nn.Conv2d(in_width, out_width, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(in_width: int, out_width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 1×1 convolution without bias."""
    return nn.Conv2d(in_width, out_width, 1, stride=stride, groups=groups, bias=False)


def global_average_pool(map_BCHW: Tensor) -> Tensor:
    """Return the mean over pixels, [B, C]. (The originals pool a window as large as a 32×32 image's map.)"""
    return nn.functional.adaptive_avg_pool2d(map_BCHW, 1).flatten(1)


def channel_shuffle(map_BCHW: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal groups (ShuffleNet, arXiv 1707.01083, figure 1)."""
    batch, channels, height, width = map_BCHW.shape
    grouped = map_BCHW.reshape(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(batch, channels, height, width)


def initialise_convolutions(model: nn.Module) -> None:
    """Draw convolution weights from N(0, 2 / fan_out) (He et al., arXiv 1502.01852) and zero their biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fold_convolution_biases(state: dict[str, Tensor], norm_after: Mapping[str, str]) -> dict[str, Tensor]:
    """Return `state` without the biases of convolutions that a batch norm follows directly.

    `norm_after` names that batch norm for each convolution, within their block. Batch norm subtracts its mean,
    so the bias `b` drops out exactly with `mean − b` as the mean: `(x + b) − mean = x − (mean − b)`.
    """
    folded = dict(state)
    for name in state:
        layer, _, kind = name.rpartition(".")
        for conv, norm in norm_after.items():
            if kind == "bias" and f".{layer}".endswith(f".{conv}"):
                mean = f"{layer.removesuffix(conv)}{norm}.running_mean"
                if mean in state:
                    folded[mean] = state[mean] - folded.pop(name)
    return folded

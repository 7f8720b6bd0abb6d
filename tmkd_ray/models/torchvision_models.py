"""`torchvision/NAME`: all of torchvision's image classifiers, randomly initialised, for the task's classes.

torchvision is imported when one of them is asked for: that takes a second.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models import SOURCES
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.wrapped import WrappedClassifier, last_linear, try_out
from tmkd_ray.registry import Registry
from tmkd_ray.types import ModelOutput, TaskSpec


def _last_of_each_resolution(model: nn.Module) -> list[str]:
    """Return the layers of `model.features` that a max pooling follows, and its last one; at most four."""
    features = model.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    pools = [index for index, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    ends = sorted({index - 1 for index in [*pools, len(features)]} - set(pools))
    return [f"features.{index}" for index in ends[-4:]]


def _named(*names: str) -> Callable[[nn.Module], list[str]]:
    return lambda model: list(names)


_LAYERS = _named("layer1", "layer2", "layer3", "layer4")
_ODD_FEATURES = _named("features.1", "features.3", "features.5", "features.7")
# The modules that put out the feature maps, by the beginning of the model's name: the longest that fits holds.
# Where no module is a stage by itself: the last one at each resolution, from a quarter on.
_STAGES: dict[str, Callable[[nn.Module], list[str]]] = {
    "alexnet": _last_of_each_resolution,
    "convnext": _ODD_FEATURES,
    "densenet": _named(*(f"features.denseblock{i}" for i in range(1, 5))),
    "efficientnet": _named("features.2", "features.3", "features.5", "features.7"),
    "efficientnet_v2_s": _named("features.2", "features.3", "features.5", "features.6"),
    "googlenet": _named("conv3", "inception3b", "inception4e", "inception5b"),
    "inception": _named("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
    "maxvit": _named(*(f"blocks.{i}" for i in range(4))),
    "mnasnet": _named("layers.8", "layers.9", "layers.11", "layers.13"),
    "mobilenet_v2": _named("features.3", "features.6", "features.13", "features.17"),
    "mobilenet_v3_large": _named("features.3", "features.6", "features.12", "features.15"),
    "mobilenet_v3_small": _named("features.1", "features.3", "features.8", "features.11"),
    "regnet": _named(*(f"trunk_output.block{i}" for i in range(1, 5))),
    "resne": _LAYERS,
    "shufflenet": _named("stage2", "stage3", "stage4"),
    "squeezenet": _last_of_each_resolution,
    "swin": _ODD_FEATURES,
    "vgg": _last_of_each_resolution,
    "wide_resnet": _LAYERS,
}


def _last_activations(model: nn.Module, stages: list[str]) -> list[str]:
    """Return the ReLU that ends each stage: of ResNets (ResNeXts, Wide ResNets), VGGs, AlexNet; of others none.

    In a ResNet the last block's `relu` serves several times, the last time after the sum; in the others the
    ReLU is the stage's last layer itself.
    """
    names = []
    for stage in stages:
        module = model.get_submodule(stage)
        if isinstance(module, nn.ReLU):
            names.append(stage)
        elif isinstance(module, nn.Sequential) and isinstance(getattr(module[-1], "relu", None), nn.ReLU):
            names.append(f"{stage}.{len(module) - 1}.relu")
    return names if len(names) == len(stages) else []


class TorchvisionClassifier(WrappedClassifier):
    """A torchvision model; `inner` is the model itself."""

    def __init__(
        self,
        wrapped: nn.Module,
        head: str,
        stages: list[str],
        channels_last: bool,
        linear_stages: bool = False,
    ) -> None:
        super().__init__(wrapped, head, stages, _last_activations(wrapped, stages))
        self._channels_last = channels_last
        self._linear_stages = linear_stages

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        output = super().forward(images_BCHW)
        if self._channels_last:
            output.feature_maps = tuple(map_BHWC.permute(0, 3, 1, 2) for map_BHWC in output.feature_maps)
        if self._linear_stages:
            output.preactivation_maps = output.feature_maps
        return output

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # The auxiliary classifiers of GoogLeNet and Inception serve training only, and are not built here.
        kept = {name: t for name, t in state.items() if not name.startswith(("aux1.", "aux2.", "AuxLogits."))}
        # DenseNet's published files say `norm.1` where the model says `norm1`.
        return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", n): t for n, t in kept.items()}


class SqueezeNetClassifier(TorchvisionClassifier):
    """SqueezeNet, whose logits are the pixel means of ReLU(1×1 convolution): not linear in a pooled feature.

    It can be a student. Its feature is the pixel mean of the convolution's input, [B, 512].
    """

    @property
    def head(self) -> nn.Linear:
        raise UserError(
            "SqueezeNet has no linear classifier, so it cannot be a visual teacher; choose another one"
        )

    @property
    def feature_width(self) -> int:
        width: int = self.wrapped.get_submodule(self._head).in_channels  # type: ignore[assignment]
        return width

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        output = super().forward(images_BCHW)
        output.feature = output.feature.mean((2, 3))
        return output


class TorchvisionSource:
    """The image classifiers of the installed torchvision."""

    def names(self) -> list[str]:
        return self._builders().names()

    def check(self, name: str) -> None:
        self._builders().get(name)

    def build(self, name: str, task: TaskSpec) -> ImageClassifier:
        try:
            network: nn.Module = self._builders().get(name)(
                weights=None, num_classes=task.num_classes, **_options(name, task)
            )
        except (AssertionError, ValueError) as error:
            size = task.image_size
            raise UserError(
                f"torchvision/{name} cannot take images of {size}×{size} pixels: {error}"
            ) from error
        families = [family for family in _STAGES if name.startswith(family)]
        stages = _STAGES[max(families, key=len)](network) if families else []
        head = "classifier.1" if name.startswith("squeezenet") else last_linear(network)
        assert head is not None
        wrapper = SqueezeNetClassifier if name.startswith("squeezenet") else TorchvisionClassifier
        model = wrapper(
            network,
            head,
            stages,
            channels_last=name.startswith("swin"),
            # Their stages end in a linear bottleneck: no ReLU follows.
            linear_stages=name.startswith(("mnasnet", "mobilenet")),
        )
        try_out(model, f"torchvision/{name}", task)
        return model

    def _builders(self) -> Registry[Callable[..., nn.Module]]:
        global _builders
        if _builders is None:
            from torchvision import models

            _builders = Registry("torchvision model")
            for name in models.list_models(module=models):
                _builders.register(name)(models.get_model_builder(name))
        return _builders


_builders: Registry[Callable[..., nn.Module]] | None = None


def _options(name: str, task: TaskSpec) -> dict[str, Any]:
    """Return the builder's arguments beside the number of classes."""
    if name.startswith("vit_"):
        return {"image_size": task.image_size}
    if name.startswith("maxvit"):
        return {"input_size": (task.image_size, task.image_size)}
    if name in ("googlenet", "inception_v3"):
        # `transform_input` is how torchvision runs its own weights of these two on ImageNet-normalised images.
        return {"aux_logits": False, "init_weights": True, "transform_input": True}
    return {}


SOURCES.register("torchvision")(TorchvisionSource())

"""The values that pass between layers.

Shape suffixes, here and in all tensor names:
    B batch · V views · C classes · D teacher feature width · S student feature width
    E CLIP embedding width · P prompt templates · K stored variants of one image
    N images · H, W height and width in pixels
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TaskSpec:
    """What a model must know of the task it is built for.

    Attributes:
        class_names: the C class names; label `i` means `class_names[i]`.
        image_size: height = width of the input, in pixels.
    """

    class_names: tuple[str, ...]
    image_size: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass
class ModelOutput:
    """What every student and visual teacher returns.

    Attributes:
        logits: [B, C].
        feature: [B, S], the input of the model's last linear layer (the penultimate feature).
        feature_maps: one [B, channels, height, width] per stage, early to late; empty for models without any.
        preactivation_maps: the same before the stage's last activation; empty for models that do not tell.
    """

    logits: Tensor
    feature: Tensor
    feature_maps: tuple[Tensor, ...] = ()
    preactivation_maps: tuple[Tensor, ...] = ()


@dataclass
class Knowledge:
    """What the frozen teachers say of each view of a batch: the content of the knowledge store.

    Attributes:
        feature: [B, V, D], penultimate features of the visual teacher.
        clip_embedding: [B, V, E], CLIP image embeddings, unit length; None without a text teacher.
        feature_maps: the visual teacher's, one [B, V, channels, height, width] per stage; None where the
            teacher does not run beside the student (they are too large to store).
        preactivation_maps: the same before the stages' last activation.
    """

    feature: Tensor
    clip_embedding: Tensor | None = None
    feature_maps: tuple[Tensor, ...] | None = None
    preactivation_maps: tuple[Tensor, ...] | None = None


@dataclass
class TeacherOutput:
    """The teaching signal of a batch, plain (one view) or fused over views.

    Attributes:
        logits: [B, C].
        feature: [B, D].
        view_weights: [B, V], semantic weights, rows sum to one.
        clip_embedding: [B, E], CLIP image embedding fused over views, unit length.
        text_bank: [V, C, E], text embeddings, unit length.
        text_logits: [B, C], CLIP's zero-shot logits: fused similarities over the CLIP temperature.

        feature_maps, preactivation_maps: of the visual teacher, fused over views by the semantic weights, one
            [B, channels, height, width] per stage; None unless the teacher runs beside the student.

    `clip_embedding`, `text_bank` and `text_logits` are None where there is no text teacher.
    """

    logits: Tensor
    feature: Tensor
    view_weights: Tensor
    clip_embedding: Tensor | None = None
    text_bank: Tensor | None = None
    text_logits: Tensor | None = None
    feature_maps: tuple[Tensor, ...] | None = None
    preactivation_maps: tuple[Tensor, ...] | None = None


@dataclass
class LossOutput:
    """A training loss and what it is made of.

    Attributes:
        loss: scalar, the weighted sum.
        terms: scalars by name, without weights.
        task: the part of `loss` that only the labels teach, with its weight; None where there is none.
        distillation: the other summands of `loss`, with their weights.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    task: Tensor | None = None
    distillation: tuple[Tensor, ...] = ()

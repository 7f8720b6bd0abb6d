"""Semantic weights and the fused teacher (TMKD, arXiv 2603.24208; formulas where it is silent are ours).

The frozen teachers' outputs per view are read from the knowledge store; everything here is small
matrix products, so temperatures, weighting and view subsets can change without running a teacher.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.types import Knowledge, TeacherOutput

Weighting = Literal["label", "margin", "confidence", "entropy", "uniform"]


def view_similarities(clip_embedding_BVE: Tensor, text_bank_VCE: Tensor) -> Tensor:
    """Return [B, V, C]: cosine of each view's CLIP embedding with its own text embedding of each class."""
    return torch.einsum("bve,vce->bvc", clip_embedding_BVE, text_bank_VCE)


def view_scores(
    similarity_BVC: Tensor, labels_B: Tensor, weighting: Weighting, clip_temperature: float
) -> Tensor:
    """Return [B, V]: how well the text teacher thinks each view shows its image's content.

    `label`: similarity with the label's text. `margin`: that minus the best other class's.
    `confidence`, `entropy`: maximum and negative entropy (nats) of the view's zero-shot distribution;
    these two use no label. `uniform`: zero.
    """
    if weighting == "uniform":
        return similarity_BVC.new_zeros(similarity_BVC.shape[:2])
    if weighting in ("label", "margin"):
        index_BV1 = labels_B[:, None, None].expand(-1, similarity_BVC.shape[1], 1)
        label_BV = similarity_BVC.gather(2, index_BV1).squeeze(2)
        if weighting == "label":
            return label_BV
        others_BVC = similarity_BVC.scatter(2, index_BV1, -torch.inf)
        return label_BV - others_BVC.amax(dim=2)
    log_probability_BVC = F.log_softmax(similarity_BVC / clip_temperature, dim=2)
    if weighting == "confidence":
        return log_probability_BVC.amax(dim=2).exp()
    return (log_probability_BVC.exp() * log_probability_BVC).sum(dim=2)


def semantic_weights(score_BV: Tensor, fusion_temperature: float) -> Tensor:
    """Return [B, V]: softmax of the scores over views; rows sum to one."""
    return F.softmax(score_BV / fusion_temperature, dim=1)


def fuse(values_BVD: Tensor, weights_BV: Tensor) -> Tensor:
    """Return [B, D]: the weighted sum over views."""
    return torch.einsum("bv,bvd->bd", weights_BV, values_BVD)


def fuse_maps(maps_BVCHW: Tensor, weights_BV: Tensor) -> Tensor:
    """Return [B, channels, height, width]: the weighted sum over views; C are channels here."""
    return torch.einsum("bv,bvchw->bchw", weights_BV, maps_BVCHW)


@dataclass(frozen=True)
class TeacherConstants:
    """What does not depend on the image: the teacher's classifier and the text bank.

    Attributes:
        view_names: the V views, in the order of the knowledge's view axis.
        head_weight, head_bias: [C, D] and [C], the visual teacher's own frozen classifier.
        text_bank: [V, C, E], unit length; None without a text teacher.
        clip_temperature: CLIP's own, 1 / exp(logit_scale); None without a text teacher.
    """

    view_names: tuple[str, ...]
    head_weight: Tensor
    head_bias: Tensor
    text_bank: Tensor | None = None
    clip_temperature: float | None = None


class TeachingSignal(nn.Module):
    """Turns a batch of stored knowledge into what the student is taught.

    Args:
        constants: classifier and text bank.
        views: the views to use, a subset of `constants.view_names`; one view makes the plain teacher.
        weighting: score of a view, see `view_scores`.
        fusion_temperature: towards 0 one view is picked, towards infinity all weigh the same.
        clip_temperature: of the zero-shot distribution; None takes CLIP's own.

    Raises:
        UserError: a view is not in the knowledge, or the weighting needs a text teacher and there is none.
    """

    positions: Tensor
    head_weight: Tensor
    head_bias: Tensor
    text_bank: Tensor | None

    def __init__(
        self,
        constants: TeacherConstants,
        views: tuple[str, ...],
        weighting: Weighting,
        fusion_temperature: float,
        clip_temperature: float | None = None,
    ) -> None:
        super().__init__()
        missing = [view for view in views if view not in constants.view_names]
        if missing:
            raise UserError(
                f"distiller.views: {', '.join(missing)} not in the knowledge, which has the views "
                f"{', '.join(constants.view_names)}; add them under `views` and run `tmkd knowledge` again"
            )
        if constants.text_bank is None and weighting != "uniform" and len(views) > 1:
            raise UserError(
                f"distiller.weighting={weighting} needs a text teacher; set teacher.text.model "
                "or distiller.weighting=uniform"
            )
        self.weighting: Weighting = weighting
        self.fusion_temperature = fusion_temperature
        self.clip_temperature = clip_temperature or constants.clip_temperature or 1.0
        positions = [constants.view_names.index(view) for view in views]
        self.only_position = positions[0] if len(positions) == 1 else None
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        self.register_buffer("head_weight", constants.head_weight.float(), persistent=False)
        self.register_buffer("head_bias", constants.head_bias.float(), persistent=False)
        bank = constants.text_bank
        self.register_buffer("text_bank", None if bank is None else bank.float()[positions], persistent=False)

    @torch.no_grad()
    def forward(self, knowledge: Knowledge, labels_B: Tensor) -> TeacherOutput:
        """Return the teaching signal of a batch; computed in float32."""
        # Autocast would round these products to half precision; a small temperature enlarges the error.
        with torch.autocast(knowledge.feature.device.type, enabled=False):
            feature_BVD = knowledge.feature[:, self.positions].float()
            similarity_BVC = clip_embedding_BVE = None
            if self.text_bank is not None:
                assert knowledge.clip_embedding is not None, "a text bank without CLIP image embeddings"
                clip_embedding_BVE = knowledge.clip_embedding[:, self.positions].float()
                similarity_BVC = view_similarities(clip_embedding_BVE, self.text_bank)
            if similarity_BVC is None:
                score_BV = feature_BVD.new_zeros(feature_BVD.shape[:2])
            else:
                score_BV = view_scores(similarity_BVC, labels_B, self.weighting, self.clip_temperature)
            weights_BV = semantic_weights(score_BV, self.fusion_temperature)
            fused_BD = fuse(feature_BVD, weights_BV)
            output = TeacherOutput(
                logits=F.linear(fused_BD, self.head_weight, self.head_bias),
                feature=fused_BD,
                view_weights=weights_BV,
                text_bank=self.text_bank,
                feature_maps=self._fused_maps(knowledge.feature_maps, weights_BV),
                preactivation_maps=self._fused_maps(knowledge.preactivation_maps, weights_BV),
            )
            if similarity_BVC is not None and clip_embedding_BVE is not None:
                output.clip_embedding = F.normalize(fuse(clip_embedding_BVE, weights_BV), dim=1)
                output.text_logits = fuse(similarity_BVC, weights_BV) / self.clip_temperature
            return output

    def _fused_maps(self, stages: tuple[Tensor, ...] | None, weights_BV: Tensor) -> tuple[Tensor, ...] | None:
        if stages is None:
            return None
        if self.only_position is not None:  # its weight is one, and maps are too large to copy for nothing
            return tuple(maps_BVCHW[:, self.only_position].float() for maps_BVCHW in stages)
        return tuple(fuse_maps(maps_BVCHW[:, self.positions].float(), weights_BV) for maps_BVCHW in stages)

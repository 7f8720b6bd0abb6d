"""The training objective: TMKD's five terms around any distillation strategy (arXiv 2603.24208).

    L = ce_weight CE + kd_weight strategy(z_S, z_T, F, …) + feature_weight |proj_D(f_S) - F|²
        + text_weight τ² KL(q ‖ p_S) + contrastive_weight L_vlc

Turning terms off leaves the baselines: `alone` (cross-entropy), `kd` (a strategy on the plain teacher).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, ValidationError, field_serializer, field_validator, model_validator
from torch import Tensor, nn

from tmkd_ray.distillers import STRATEGIES, DistillationSpec, Strategy, StrategyConfig, build_strategy
from tmkd_ray.distillers.feature_mse import FeatureMSE, FeatureMSEConfig
from tmkd_ray.distillers.kd import KDConfig
from tmkd_ray.fusion import Weighting
from tmkd_ray.losses import gather_from_workers, info_nce, kl_divergence
from tmkd_ray.settings import SectionError, Settings, explain, resolve_named, shown
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

TERMS = ("ce", "kd", "feature", "text", "contrastive")
"""The terms of the objective; the weight of each is the field `<term>_weight`."""

PRESETS: dict[str, dict[str, Any]] = {
    "alone": {"teacher": "none", "ce_weight": 1.0},
    "kd": {"teacher": "plain", "ce_weight": 0.1, "kd_weight": 0.9},
    "tmkd": {
        "teacher": "fused",
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "feature_weight": 0.1,
        "text_weight": 0.1,
        "contrastive_weight": 0.1,
    },
}


class WeightSchedule(Settings):
    """A weight that changes: linearly from `start` to `end` in the first `epochs`, then constant."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    epochs: float = Field(gt=0)

    def __bool__(self) -> bool:
        """Whether the weight ever is above zero, as with a plain number."""
        return self.start > 0 or self.end > 0

    def at(self, epoch: float) -> float:
        """Return the weight after so many epochs; a fraction within an epoch counts."""
        return self.start + (self.end - self.start) * min(epoch / self.epochs, 1.0)


Weight = float | WeightSchedule


def weight_at(weight: Weight, epoch: float) -> float:
    """Return the weight after so many epochs."""
    return weight.at(epoch) if isinstance(weight, WeightSchedule) else weight


class DistillerConfig(Settings):
    """What the student learns from, and how much of each.

    `name` picks defaults (`alone`, `kd`, `tmkd`); every field can still be set. As a bare string
    (`distiller: kd`) it stands for the preset. A weight is a number or a schedule,
    `kd_weight: {start: 0, end: 1, epochs: 20}`.
    """

    name: Literal["alone", "kd", "tmkd"] = "tmkd"
    teacher: Literal["none", "plain", "fused"] = Field(
        description="plain: on the first view alone; fused: its features of all views, by semantic weight"
    )
    strategy: SerializeAsAny[StrategyConfig] = Field(default_factory=KDConfig)
    views: tuple[str, ...] | None = Field(
        default=None,
        description="views to fuse; null: all. The plain teacher uses the first",
    )
    weighting: Weighting = Field(default="label", description="a view's score; see the page on the method")
    fusion_temperature: float = Field(
        default=0.1,
        gt=0,
        description="of the softmax over the views' scores: high weighs all alike, low picks one",
    )
    clip_temperature: float | None = Field(default=None, gt=0, description="null: CLIP's own")
    ce_weight: Weight = Field(default=0.0, description="of the cross-entropy with the labels")
    kd_weight: Weight = Field(default=0.0, description="of the strategy")
    feature_weight: Weight = Field(default=0.0, description="of the distance to the teacher's feature")
    text_weight: Weight = Field(default=0.0, description="of the divergence from CLIP's zero-shot distribution")
    text_temperature: float = Field(
        default=1.0, gt=0, description="of the student's logits in the text term; CLIP's have clip_temperature"
    )
    contrastive_weight: Weight = Field(default=0.0, description="of vision-language contrast")
    contrastive_mode: Literal["class", "instance", "both"] = Field(
        default="both", description="against class texts, against the batch's CLIP image embeddings, or both"
    )
    contrastive_temperature: float = Field(default=0.1, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if isinstance(data, dict):
            data = {**PRESETS.get(str(data.get("name", "tmkd")), PRESETS["tmkd"]), **data}
        return data

    @field_validator("strategy", mode="before")
    @classmethod
    def _resolve_strategy(cls, value: Any) -> Any:
        return resolve_named(value, STRATEGIES, default="kd")

    @field_validator(*(f"{term}_weight" for term in TERMS), mode="plain")
    @classmethod
    def _read_weight(cls, value: Any) -> Weight:
        # By hand, because Pydantic reports what is wrong with each alternative of a union.
        if isinstance(value, WeightSchedule):
            return value
        if isinstance(value, dict):
            try:
                return WeightSchedule.model_validate(value)
            except ValidationError as error:
                raise SectionError(explain(error, WeightSchedule)) from error
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"expected a number, or start, end and epochs (given: {shown(value)})")
        if not value >= 0:
            raise ValueError(f"must be at least 0 (given: {shown(value)})")
        return float(value)

    @field_serializer(*(f"{term}_weight" for term in TERMS))
    def _write_weight(self, value: Weight) -> Any:
        return value.model_dump() if isinstance(value, WeightSchedule) else value

    @model_validator(mode="after")
    def _check_terms(self) -> "DistillerConfig":
        used = [term for term in TERMS if getattr(self, f"{term}_weight")]
        # A strategy that reads nothing of the teacher can do without one.
        taught = [term for term in used if term != "ce" and (term != "kd" or self._strategy.requires)]
        if self.teacher == "none" and taught:
            wanted = ", ".join(f"{term}_weight" for term in taught)
            raise ValueError(f"teacher is none, but {wanted} is above zero")
        if not used:
            raise ValueError("every loss weight is zero: nothing to learn from")
        return self

    @property
    def _strategy(self) -> type[Strategy]:
        return STRATEGIES.get(self.strategy.name)

    @property
    def requires(self) -> frozenset[str]:
        """The fields of `TeacherOutput` that the terms in use read."""
        needed: set[str] = set()
        if self.kd_weight:
            needed |= self._strategy.requires
        if self.feature_weight:
            needed.add("feature")
        if self.text_weight:
            needed.add("text_logits")
        if self.contrastive_weight:
            if self.contrastive_mode != "instance":
                needed.add("text_bank")
            if self.contrastive_mode != "class":
                needed.add("clip_embedding")
        return frozenset(needed)

    @property
    def trains_classifier(self) -> bool:
        """Whether some term reads the student's logits: without one its classifier would stay random."""
        by_strategy = bool(self.kd_weight) and self._strategy.trains_classifier
        return by_strategy or bool(self.ce_weight) or bool(self.text_weight)

    @property
    def needs_text_teacher(self) -> bool:
        """Whether CLIP takes part: in a term, or in the views' weights."""
        weighs = self.teacher == "fused" and self.weighting != "uniform"
        return weighs or bool(self.requires & {"text_logits", "clip_embedding", "text_bank"})

    @property
    def needs_online(self) -> bool:
        """Whether the teacher must run beside the student: its maps are too large to store."""
        return bool(self.requires & {"feature_maps", "preactivation_maps"})

    @property
    def mixes_task_and_distillation(self) -> bool:
        """Whether cross-entropy stands beside another term, as an optimiser that parts the two asks for."""
        return bool(self.ce_weight) and any(getattr(self, f"{term}_weight") for term in TERMS[1:])


def class_contrast(
    embedding_BE: Tensor, text_bank_VCE: Tensor, view_weights_BV: Tensor, labels_B: Tensor, temperature: float
) -> Tensor:
    """InfoNCE of the student's embedding against the class texts, each view's text by its semantic weight.

    Args:
        embedding_BE: unit length.
    """
    similarity_BVC = torch.einsum("be,vce->bvc", embedding_BE, text_bank_VCE)
    similarity_BC = torch.einsum("bv,bvc->bc", view_weights_BV, similarity_BVC)
    return info_nce(similarity_BC / temperature, labels_B)


def instance_contrast(embedding_BE: Tensor, clip_embedding_BE: Tensor, temperature: float) -> Tensor:
    """InfoNCE of the student's embedding against the CLIP image embeddings of the global batch.

    The positive is the image's own; the negatives come from all DDP workers.

    Args:
        embedding_BE, clip_embedding_BE: unit length.
    """
    keys_NE, start = gather_from_workers(clip_embedding_BE)
    targets_B = torch.arange(len(embedding_BE), device=embedding_BE.device) + start
    return info_nce(embedding_BE @ keys_NE.T / temperature, targets_B)


class Distiller(nn.Module):
    """The objective with its trainable heads. It holds no teacher: the teacher's output comes with the batch.

    Args:
        label_smoothing: of the cross-entropy term.
    """

    def __init__(self, config: DistillerConfig, spec: DistillationSpec, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.label_smoothing = label_smoothing
        self.strategy = build_strategy(config.strategy, spec) if config.kd_weight else None
        self.feature = FeatureMSE(FeatureMSEConfig(), spec) if config.feature_weight else None
        self.projection: nn.Linear | None = None
        if config.contrastive_weight:
            assert spec.clip_width is not None
            self.projection = nn.Linear(spec.student_width, spec.clip_width)
        self.set_progress(0.0)

    def set_progress(self, epoch: float) -> None:
        """Set the weights to what they are after so many epochs; a fraction within an epoch counts."""
        self.weights = {term: weight_at(getattr(self.config, f"{term}_weight"), epoch) for term in TERMS}

    def forward(self, student: ModelOutput, teacher: TeacherOutput | None, labels_B: Tensor) -> LossOutput:
        """Return the weighted loss and its unweighted terms.

        A term whose weight is zero at the moment is computed too: DDP wants a gradient for every head.

        Args:
            teacher: None where `config.teacher` is none.
        """
        config = self.config
        terms: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        if config.ce_weight:
            terms["ce"] = F.cross_entropy(
                student.logits.float(), labels_B, label_smoothing=self.label_smoothing
            )
        assert (teacher is None) == (config.teacher == "none"), config.teacher
        if self.strategy is not None:
            output: LossOutput = self.strategy(student, teacher, labels_B)
            terms["kd"], parts = output.loss, output.terms
        if teacher is not None:
            if self.feature is not None:
                terms["feature"] = self.feature(student, teacher, labels_B).loss
            if config.text_weight:
                terms["text"] = self._text_term(student, teacher)
            if self.projection is not None:
                terms["contrastive"] = self._contrastive_term(self.projection, student, teacher, labels_B)
        weighted = {name: self.weights[name] * value for name, value in terms.items()}
        return LossOutput(
            torch.stack(list(weighted.values())).sum(),
            terms | parts,
            task=weighted.get("ce"),
            distillation=tuple(value for name, value in weighted.items() if name != "ce"),
        )

    def after_step(self, sample_indices_B: Tensor) -> None:
        """Let the strategy update state that no gradient trains, see `Strategy.after_step`."""
        if self.strategy is not None:
            self.strategy.after_step(sample_indices_B)

    def _text_term(self, student: ModelOutput, teacher: TeacherOutput) -> Tensor:
        assert teacher.text_logits is not None
        # q is already at CLIP's temperature; only the student's logits are softened.
        temperature = self.config.text_temperature
        return kl_divergence(teacher.text_logits, student.logits / temperature, 1.0) * temperature**2

    def _contrastive_term(
        self, projection: nn.Linear, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor
    ) -> Tensor:
        config = self.config
        embedding_BE = F.normalize(projection(student.feature).float(), dim=1)
        losses = []
        # Autocast would round the similarities to half precision; the temperature enlarges the error.
        with torch.autocast(embedding_BE.device.type, enabled=False):
            if config.contrastive_mode in ("class", "both"):
                assert teacher.text_bank is not None
                losses.append(
                    class_contrast(
                        embedding_BE,
                        teacher.text_bank,
                        teacher.view_weights,
                        labels_B,
                        config.contrastive_temperature,
                    )
                )
            if config.contrastive_mode in ("instance", "both"):
                assert teacher.clip_embedding is not None
                losses.append(
                    instance_contrast(embedding_BE, teacher.clip_embedding, config.contrastive_temperature)
                )
        return torch.stack(losses).mean()

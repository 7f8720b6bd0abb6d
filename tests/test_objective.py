"""The weighted objective against the formulas in reference_formulas."""

import math
from typing import Any

import numpy as np
import pytest
import reference_formulas as reference
import torch
from reference_formulas import Array
from teaching_samples import (
    BATCH,
    CLASSES,
    CLIP_WIDTH,
    LABELS,
    SPEC,
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    VIEWS,
    distiller_of,
    extreme_outputs,
    f64,
    normal,
    student_output,
    teacher_output,
    unit,
)

from tmkd_ray.distillers import STRATEGIES, DistillationSpec
from tmkd_ray.objective import (
    Distiller,
    DistillerConfig,
    class_contrast,
    instance_contrast,
)
from tmkd_ray.types import ModelOutput, TeacherOutput

TERMS = ("ce", "kd", "feature", "text", "contrastive")
MODES = ("class", "instance", "both")
OPTIONAL = ("clip_embedding", "text_bank", "text_logits")


# Contrastive terms --------------------------------------------------------------------------------


@pytest.fixture
def embedding() -> torch.Tensor:
    return unit(torch.Generator().manual_seed(5), BATCH, CLIP_WIDTH).requires_grad_()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_class_contrast_is_the_formula(embedding: torch.Tensor, temperature: float) -> None:
    teacher = teacher_output()
    assert teacher.text_bank is not None
    loss = class_contrast(embedding, teacher.text_bank, teacher.view_weights, LABELS, temperature)
    loss.backward()

    def formula(embedding_BE: Array) -> float:
        return reference.class_contrast(
            embedding_BE, f64(teacher.text_bank), f64(teacher.view_weights), LABELS.numpy(), temperature
        )

    assert loss.item() == pytest.approx(formula(f64(embedding)), rel=1e-5)
    np.testing.assert_allclose(
        f64(embedding.grad), reference.central_difference(formula, f64(embedding)), rtol=1e-3, atol=1e-5
    )


def test_class_contrast_of_one_view_is_plain_info_nce(embedding: torch.Tensor) -> None:
    bank = unit(torch.Generator().manual_seed(6), 1, CLASSES, CLIP_WIDTH)
    loss = class_contrast(embedding, bank, torch.ones(BATCH, 1), LABELS, 0.1)
    expected = reference.info_nce(f64(embedding) @ f64(bank[0]).T / 0.1, LABELS.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_class_contrast_follows_the_weights_of_the_views(embedding: torch.Tensor) -> None:
    """A view of weight one is the only one that counts, image by image."""
    bank = unit(torch.Generator().manual_seed(6), VIEWS, CLASSES, CLIP_WIDTH)
    picks = torch.tensor([2, 0, 1, 2])
    weights = torch.nn.functional.one_hot(picks, VIEWS).float()
    loss = class_contrast(embedding, bank, weights, LABELS, 0.1).item()
    each = [
        reference.info_nce(f64(embedding[b : b + 1]) @ f64(bank[v]).T / 0.1, LABELS[b : b + 1].numpy())
        for b, v in enumerate(picks.tolist())
    ]
    assert loss == pytest.approx(np.mean(each), rel=1e-5)


def test_class_contrast_is_least_where_the_embedding_is_the_labels_text() -> None:
    """With orthonormal texts: log(1 + (C - 1) exp(-1/τ)) at the label's own, larger anywhere else."""
    bank = torch.eye(CLASSES, CLIP_WIDTH)[None]
    best = class_contrast(bank[0, LABELS], bank, torch.ones(BATCH, 1), LABELS, 0.5)
    assert best.item() == pytest.approx(math.log(1 + (CLASSES - 1) * math.exp(-2)), rel=1e-5)
    assert class_contrast(bank[0, (LABELS + 1) % CLASSES], bank, torch.ones(BATCH, 1), LABELS, 0.5) > best


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_instance_contrast_is_the_formula(embedding: torch.Tensor, temperature: float) -> None:
    clip = teacher_output().clip_embedding
    assert clip is not None
    loss = instance_contrast(embedding, clip, temperature)
    loss.backward()

    def formula(embedding_BE: Array) -> float:
        return reference.instance_contrast(embedding_BE, f64(clip), temperature)

    assert loss.item() == pytest.approx(formula(f64(embedding)), rel=1e-5)
    np.testing.assert_allclose(
        f64(embedding.grad), reference.central_difference(formula, f64(embedding)), rtol=1e-3, atol=1e-5
    )


def test_instance_contrast_and_the_order_of_the_batch(embedding: torch.Tensor) -> None:
    """The order of the batch changes nothing; embeddings that go to another image's place do."""
    clip = teacher_output().clip_embedding
    assert clip is not None
    loss = instance_contrast(embedding, clip, 0.1).item()
    order = torch.tensor([2, 0, 3, 1])
    assert instance_contrast(embedding[order], clip[order], 0.1).item() == pytest.approx(loss, rel=1e-5)
    assert instance_contrast(embedding[order], clip, 0.1).item() != pytest.approx(loss, rel=1e-2)
    assert instance_contrast(clip, clip, 0.1) < instance_contrast(clip[order], clip, 0.1)


def test_instance_contrast_of_a_lone_image_is_zero(embedding: torch.Tensor) -> None:
    assert instance_contrast(embedding[:1], embedding[1:2].detach(), 0.1).item() == 0.0


# The objective ------------------------------------------------------------------------------------

WEIGHTS = {"ce": 0.3, "kd": 0.9, "feature": 0.7, "text": 0.4, "contrastive": 1.7}
OPTIONS: dict[str, Any] = {
    "strategy": {"name": "dkd", "temperature": 3.0, "target_weight": 0.5, "non_target_weight": 2.0},
    "text_temperature": 2.0,
    "contrastive_temperature": 0.2,
}


def reference_terms(
    distiller: Distiller, teacher: TeacherOutput, logits_BC: Array, feature_BS: Array
) -> dict[str, float]:
    """Every term of the objective for `OPTIONS`, with the distiller's heads."""
    config, labels = distiller.config, LABELS.numpy()
    tckd, nckd = reference.decoupled_kl(f64(teacher.logits), logits_BC, labels, 3.0)
    assert distiller.feature is not None
    assert distiller.projection is not None
    head, projection = distiller.feature.projection, distiller.projection
    embedding_BE = reference.normalize(
        reference.linear(feature_BS, f64(projection.weight), f64(projection.bias))
    )
    contrasts = {
        "class": reference.class_contrast(
            embedding_BE, f64(teacher.text_bank), f64(teacher.view_weights), labels, 0.2
        ),
        "instance": reference.instance_contrast(embedding_BE, f64(teacher.clip_embedding), 0.2),
    }
    contrasts["both"] = (contrasts["class"] + contrasts["instance"]) / 2
    return {
        "ce": reference.cross_entropy(logits_BC, labels, distiller.label_smoothing),
        "kd": float(0.5 * tckd.mean() + 2.0 * nckd.mean()),
        "feature": reference.mean_squared_error(
            reference.linear(feature_BS, f64(head.weight), f64(head.bias)), f64(teacher.feature)
        ),
        "text": reference.text_term(f64(teacher.text_logits), logits_BC, 2.0),
        "contrastive": contrasts[config.contrastive_mode],
        "tckd": float(tckd.mean()),
        "nckd": float(nckd.mean()),
    }


def reference_loss(terms: dict[str, float]) -> float:
    return sum(weight * terms[name] for name, weight in WEIGHTS.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_objective_is_the_formula(mode: str, label_smoothing: float) -> None:
    weights = {f"{term}_weight": weight for term, weight in WEIGHTS.items()}
    distiller = distiller_of(label_smoothing, contrastive_mode=mode, **OPTIONS, **weights)
    student, teacher = student_output(), teacher_output()
    output = distiller(student, teacher, LABELS)
    output.loss.backward()

    logits, feature = f64(student.logits), f64(student.feature)
    expected = reference_terms(distiller, teacher, logits, feature)
    assert output.terms.keys() == expected.keys()
    for name, value in output.terms.items():
        assert value.shape == ()
        assert value.item() == pytest.approx(expected[name], rel=1e-4), name
    assert output.loss.shape == ()
    assert output.loss.item() == pytest.approx(reference_loss(expected), rel=1e-4)

    def of_logits(z: Array) -> float:
        return reference_loss(reference_terms(distiller, teacher, z, feature))

    def of_feature(f: Array) -> float:
        return reference_loss(reference_terms(distiller, teacher, logits, f))

    for actual, formula, at in (
        (student.logits.grad, of_logits, logits),
        (student.feature.grad, of_feature, feature),
    ):
        np.testing.assert_allclose(f64(actual), reference.central_difference(formula, at), rtol=1e-3, atol=1e-5)


def test_the_objective_of_kd_by_hand() -> None:
    """0.1 CE + 0.9 KD at T = 4 on the plain teacher, as the field has it."""
    distiller = Distiller(DistillerConfig.model_validate("kd"), SPEC)
    student, teacher = student_output(), teacher_output(views=1)
    output = distiller(student, teacher, LABELS)
    ce = reference.cross_entropy(f64(student.logits), LABELS.numpy())
    kd = reference.kl_divergence(f64(teacher.logits), f64(student.logits), 4.0)
    assert output.terms.keys() == {"ce", "kd"}
    assert output.loss.item() == pytest.approx(0.1 * ce + 0.9 * kd, rel=1e-5)


def test_alone_is_cross_entropy() -> None:
    distiller = Distiller(DistillerConfig.model_validate("alone"), DistillationSpec(CLASSES, STUDENT_WIDTH))
    student = student_output()
    output = distiller(student, None, LABELS)
    assert output.terms.keys() == {"ce"}
    assert output.loss.item() == pytest.approx(
        reference.cross_entropy(f64(student.logits), LABELS.numpy()), rel=1e-5
    )
    assert list(distiller.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = student_output().logits.to(dtype)
    distiller = Distiller(DistillerConfig.model_validate("alone"), SPEC)
    loss = distiller(ModelOutput(logits, student_output().feature), None, LABELS).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.cross_entropy(f64(logits), LABELS.numpy()), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_text_term_softens_the_student_alone(temperature: float) -> None:
    distiller = distiller_of(text_weight=1, text_temperature=temperature)
    student, teacher = student_output(), teacher_output()
    loss = distiller(student, teacher, LABELS).loss
    loss.backward()

    def formula(logits_BC: Array) -> float:
        return reference.text_term(f64(teacher.text_logits), logits_BC, temperature)

    assert loss.item() == pytest.approx(formula(f64(student.logits)), rel=1e-5)
    np.testing.assert_allclose(
        f64(student.logits.grad),
        reference.central_difference(formula, f64(student.logits)),
        rtol=1e-3,
        atol=1e-6,
    )
    # Zero where the softened student is CLIP's zero-shot distribution itself.
    assert teacher.text_logits is not None
    agreeing = ModelOutput(teacher.text_logits * temperature + 3.0, student.feature)
    assert distiller(agreeing, teacher, LABELS).loss.item() == pytest.approx(0.0, abs=1e-5)


def test_weights_follow_their_schedules() -> None:
    schedules = {f"{term}_weight": {"start": i, "end": 2 * i + 1, "epochs": 10} for i, term in enumerate(TERMS)}
    distiller = distiller_of(**schedules)
    for epoch, share in ((0, 0.0), (2.5, 0.25), (10, 1.0), (99, 1.0), (5, 0.5)):
        distiller.set_progress(epoch)
        numbers = {f"{term}_weight": i + share * (i + 1) for i, term in enumerate(TERMS)}
        expected = distiller_of(**numbers | {"kd_weight": max(numbers["kd_weight"], 1e-30)})
        if numbers["ce_weight"]:
            output = distiller(student_output(), teacher_output(), LABELS)
            whole = expected(student_output(), teacher_output(), LABELS)
            assert torch.equal(output.loss, whole.loss)
            assert output.terms == whole.terms


def test_a_schedule_starts_where_it_says() -> None:
    """Before the first call of `set_progress`; a term of weight zero has heads, and a gradient of zero."""
    distiller = distiller_of(
        ce_weight=1.0, kd_weight={"start": 0, "end": 1, "epochs": 2}, strategy="feature_mse"
    )
    output = distiller(student_output(), teacher_output(), LABELS)
    assert torch.equal(output.loss, output.terms["ce"])
    output.loss.backward()
    for parameter in distiller.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0


def test_progress_changes_no_plain_number() -> None:
    distiller = distiller_of(ce_weight=0.3, kd_weight=0.9)
    loss = distiller(student_output(), teacher_output(), LABELS).loss
    distiller.set_progress(17.5)
    assert torch.equal(distiller(student_output(), teacher_output(), LABELS).loss, loss)


@pytest.mark.parametrize("terms", [("ce",), ("kd",), ("ce", "kd"), TERMS], ids="+".join)
def test_the_loss_is_the_task_and_the_distillation(terms: tuple[str, ...]) -> None:
    """With their weights; cross-entropy is the task."""
    distiller = distiller_of(**{f"{term}_weight": WEIGHTS[term] for term in terms})
    output = distiller(student_output(), teacher_output(), LABELS)
    taught = [WEIGHTS[term] * output.terms[term] for term in terms if term != "ce"]
    assert len(output.distillation) == len(taught)
    assert all(torch.equal(a, b) for a, b in zip(output.distillation, taught, strict=True))
    assert (output.task is None) == ("ce" not in terms)
    parts = [part for part in (output.task, *output.distillation) if part is not None]
    assert output.loss.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-6)
    if output.task is not None:
        assert torch.equal(output.task, WEIGHTS["ce"] * output.terms["ce"])


def test_a_weight_scales_its_term_and_no_other() -> None:
    for term in TERMS:
        others = {f"{other}_weight": 1.0 for other in TERMS}
        one, five = (distiller_of(**others | {f"{term}_weight": weight}) for weight in (1.0, 5.0))
        of_one, of_five = (d(student_output(), teacher_output(), LABELS) for d in (one, five))
        for name, value in of_one.terms.items():
            assert torch.equal(of_five.terms[name], value)
        assert (of_five.loss - of_one.loss).item() == pytest.approx(4 * of_one.terms[term].item(), rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_every_parameter_of_the_distiller_gets_a_gradient(strategy: str, mode: str) -> None:
    weights = {f"{term}_weight": weight for term, weight in WEIGHTS.items()}
    distiller = distiller_of(strategy=strategy, contrastive_mode=mode, **weights)
    student = student_output()
    distiller(student, teacher_output(), LABELS).loss.backward()
    outputs = {"logits": student.logits, "feature": student.feature}
    for name, value in (dict(distiller.named_parameters()) | outputs).items():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


def test_a_strategy_that_has_no_weight_has_no_head() -> None:
    assert list(distiller_of(ce_weight=1, strategy="feature_mse").parameters()) == []
    assert len(list(distiller_of(kd_weight=1, strategy="feature_mse").parameters())) == 2


@pytest.mark.parametrize("terms", [*((term,) for term in TERMS), TERMS], ids="+".join)
def test_heads_exist_only_for_the_terms_in_use(terms: tuple[str, ...]) -> None:
    distiller = distiller_of(**{f"{term}_weight": 1.0 for term in terms})
    shapes = {name: tuple(value.shape) for name, value in distiller.named_parameters()}
    expected = {}
    if "feature" in terms:
        expected |= {
            "feature.projection.weight": (TEACHER_WIDTH, STUDENT_WIDTH),
            "feature.projection.bias": (TEACHER_WIDTH,),
        }
    if "contrastive" in terms:
        expected |= {"projection.weight": (CLIP_WIDTH, STUDENT_WIDTH), "projection.bias": (CLIP_WIDTH,)}
    assert shapes == expected
    distiller_of(kd_weight=0.0, ce_weight=1.0, strategy="feature_mse").load_state_dict(
        {}
    )  # no head: not in use


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_finite_under_autocast_at_extreme_logits(strategy: str, dtype: torch.dtype, mode: str) -> None:
    weights = {f"{term}_weight": weight for term, weight in WEIGHTS.items()}
    distiller = distiller_of(
        0.1, strategy=strategy, contrastive_mode=mode, contrastive_temperature=0.01, **weights
    )
    student, teacher, labels = extreme_outputs(dtype)
    with torch.autocast("cpu", dtype=dtype):
        output = distiller(student, teacher, labels)
    output.loss.backward()
    for value in (output.loss, *output.terms.values()):
        assert value.dtype == torch.float32
        assert value.isfinite()
    for gradient in (student.logits.grad, student.feature.grad, *(p.grad for p in distiller.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_projection_is_rounded_under_autocast(dtype: torch.dtype, mode: str) -> None:
    """Similarities are divided by a small temperature: they must not be rounded to half precision."""
    distiller = distiller_of(contrastive_weight=1, contrastive_mode=mode, contrastive_temperature=0.01)
    student, teacher = student_output(), teacher_output()
    assert distiller.projection is not None
    with torch.autocast("cpu", dtype=dtype):
        loss = distiller(student, teacher, LABELS).loss
        projected = distiller.projection(student.feature)
    assert projected.dtype == dtype
    embedding_BE = reference.normalize(f64(projected))
    expected = {
        "class": reference.class_contrast(
            embedding_BE, f64(teacher.text_bank), f64(teacher.view_weights), LABELS.numpy(), 0.01
        ),
        "instance": reference.instance_contrast(embedding_BE, f64(teacher.clip_embedding), 0.01),
    }
    expected["both"] = (expected["class"] + expected["instance"]) / 2
    assert loss.item() == pytest.approx(expected[mode], rel=1e-5)


def test_embeddings_count_by_their_direction_alone() -> None:
    distiller = distiller_of(contrastive_weight=1)
    assert distiller.projection is not None
    torch.nn.init.zeros_(distiller.projection.bias)
    student, teacher = student_output(), teacher_output()
    longer = ModelOutput(student.logits, 40.0 * student.feature)
    assert distiller(longer, teacher, LABELS).loss.item() == pytest.approx(
        distiller(student, teacher, LABELS).loss.item(), rel=1e-4
    )


def test_the_text_teachers_outputs_are_optional() -> None:
    """A plain teacher without CLIP teaches `kd` and `feature`."""
    distiller = distiller_of(teacher="plain", kd_weight=1, feature_weight=1)
    generator = torch.Generator().manual_seed(7)
    teacher = TeacherOutput(
        normal(generator, BATCH, CLASSES), normal(generator, BATCH, 6), torch.ones(BATCH, 1)
    )
    assert all(getattr(teacher, name) is None for name in OPTIONAL)
    assert distiller(student_output(), teacher, LABELS).terms.keys() == {"kd", "feature"}

"""Semantic weights and the fused teacher against the formulas in reference_formulas."""

from math import log

import numpy as np
import pytest
import reference_formulas as reference
import torch
from teaching_samples import BATCH, CLASSES, CLIP_WIDTH, LABELS, TEACHER_WIDTH, VIEWS, f64, normal, unit

from tmkd_ray.errors import UserError
from tmkd_ray.fusion import (
    TeacherConstants,
    TeachingSignal,
    Weighting,
    fuse,
    semantic_weights,
    view_scores,
    view_similarities,
)
from tmkd_ray.types import Knowledge

NAMES = ("original", "edge", "high_frequency")
WEIGHTINGS: tuple[Weighting, ...] = ("label", "margin", "confidence", "entropy", "uniform")
SUBSETS = (NAMES, ("high_frequency", "original"), ("edge",))
CLIP_TEMPERATURE = 0.05
FUSION_TEMPERATURE = 0.2
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)
semantic_weighting = pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uniform"])


@pytest.fixture
def knowledge() -> Knowledge:
    generator = torch.Generator().manual_seed(3)
    return Knowledge(normal(generator, BATCH, VIEWS, TEACHER_WIDTH), unit(generator, BATCH, VIEWS, CLIP_WIDTH))


@pytest.fixture
def constants() -> TeacherConstants:
    generator = torch.Generator().manual_seed(4)
    return TeacherConstants(
        NAMES,
        head_weight=normal(generator, CLASSES, TEACHER_WIDTH),
        head_bias=normal(generator, CLASSES),
        text_bank=unit(generator, VIEWS, CLASSES, CLIP_WIDTH),
        clip_temperature=CLIP_TEMPERATURE,
    )


@pytest.fixture
def without_text(constants: TeacherConstants) -> TeacherConstants:
    return TeacherConstants(NAMES, constants.head_weight, constants.head_bias)


@pytest.fixture
def similarity(knowledge: Knowledge, constants: TeacherConstants) -> torch.Tensor:
    assert knowledge.clip_embedding is not None
    assert constants.text_bank is not None
    return view_similarities(knowledge.clip_embedding, constants.text_bank)


def test_similarities_are_cosines_with_the_views_own_texts(
    knowledge: Knowledge, constants: TeacherConstants, similarity: torch.Tensor
) -> None:
    expected = reference.view_similarities(f64(knowledge.clip_embedding), f64(constants.text_bank))
    np.testing.assert_allclose(f64(similarity), expected, rtol=1e-5, atol=1e-6)


@every_weighting
@pytest.mark.parametrize("clip_temperature", [0.01, 0.05, 1.0])
def test_scores_are_the_formula(
    similarity: torch.Tensor, weighting: Weighting, clip_temperature: float
) -> None:
    score = view_scores(similarity, LABELS, weighting, clip_temperature)
    expected = reference.view_scores(f64(similarity), LABELS.numpy(), weighting, clip_temperature)
    np.testing.assert_allclose(f64(score), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("label", [log(2), 0.0]),
        ("margin", [log(2), -log(8)]),
        ("confidence", [1 / 2, 8 / 10]),
        ("entropy", [-1.5 * log(2), 0.8 * log(0.8) + 0.2 * log(0.1)]),
        ("uniform", [0.0, 0.0]),
    ],
)
def test_scores_by_hand(weighting: Weighting, expected: list[float]) -> None:
    """Zero-shot distributions (1/2, 1/4, 1/4) and (1/10, 1/10, 8/10); the label is the first class."""
    similarity = torch.tensor([[[log(2), 0.0, 0.0], [0.0, 0.0, log(8)]]])
    score = view_scores(similarity, torch.tensor([0]), weighting, 1.0)
    np.testing.assert_allclose(f64(score)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("weighting", ["confidence", "entropy", "uniform"])
def test_weightings_that_use_no_label(similarity: torch.Tensor, weighting: Weighting) -> None:
    score = view_scores(similarity, LABELS, weighting, CLIP_TEMPERATURE)
    torch.testing.assert_close(
        view_scores(similarity, (LABELS + 1) % CLASSES, weighting, CLIP_TEMPERATURE), score
    )


@pytest.mark.parametrize("weighting", ["confidence", "entropy"])
def test_a_surer_view_scores_higher(weighting: Weighting) -> None:
    similarity = torch.tensor([[[0.2, 0.2, 0.2], [0.2, 0.21, 0.2], [0.2, 0.5, 0.2]]])
    score = view_scores(similarity, torch.tensor([0]), weighting, 0.05)[0]
    assert score[0] < score[1] < score[2]


def test_margin_is_positive_exactly_where_the_view_names_the_label(similarity: torch.Tensor) -> None:
    score = view_scores(similarity, LABELS, "margin", CLIP_TEMPERATURE)
    right = similarity.argmax(dim=2) == LABELS[:, None]
    assert right.any()
    assert not right.all()
    assert torch.equal(score > 0, right)


def test_scoring_leaves_the_similarities_as_they_are(similarity: torch.Tensor) -> None:
    before = similarity.clone()
    for weighting in WEIGHTINGS:
        view_scores(similarity, LABELS, weighting, CLIP_TEMPERATURE)
    assert torch.equal(similarity, before)


@every_weighting
@pytest.mark.parametrize("temperature", [1e-4, 0.1, 1.0, 1e4])
def test_weights_are_positive_rows_that_sum_to_one(
    similarity: torch.Tensor, weighting: Weighting, temperature: float
) -> None:
    score = view_scores(similarity, LABELS, weighting, CLIP_TEMPERATURE)
    weights = semantic_weights(score, temperature)
    assert weights.shape == (BATCH, VIEWS)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(BATCH))
    np.testing.assert_allclose(f64(weights), reference.softmax(f64(score) / temperature), rtol=1e-3, atol=1e-6)


@semantic_weighting
def test_a_hot_fusion_weighs_all_views_alike(similarity: torch.Tensor, weighting: Weighting) -> None:
    weights = semantic_weights(view_scores(similarity, LABELS, weighting, CLIP_TEMPERATURE), 1e6)
    torch.testing.assert_close(weights, torch.full((BATCH, VIEWS), 1 / VIEWS), rtol=1e-5, atol=0)


@semantic_weighting
def test_a_cold_fusion_picks_the_view_with_the_best_score(
    similarity: torch.Tensor, weighting: Weighting
) -> None:
    score = view_scores(similarity, LABELS, weighting, CLIP_TEMPERATURE)
    picked = torch.nn.functional.one_hot(score.argmax(dim=1), VIEWS).float()
    torch.testing.assert_close(semantic_weights(score, 1e-6), picked, rtol=0, atol=1e-6)


def test_fuse_is_the_weighted_sum_over_views(knowledge: Knowledge) -> None:
    weights = torch.softmax(torch.arange(12.0).reshape(BATCH, VIEWS).sin(), dim=1)
    expected = reference.fuse(f64(knowledge.feature), f64(weights))
    np.testing.assert_allclose(f64(fuse(knowledge.feature, weights)), expected, rtol=1e-5, atol=1e-6)


@every_weighting
@pytest.mark.parametrize("views", SUBSETS, ids="+".join)
@pytest.mark.parametrize("clip_temperature", [None, 0.3])
def test_the_teaching_signal_is_the_formula(
    knowledge: Knowledge,
    constants: TeacherConstants,
    weighting: Weighting,
    views: tuple[str, ...],
    clip_temperature: float | None,
) -> None:
    signal = TeachingSignal(constants, views, weighting, FUSION_TEMPERATURE, clip_temperature)
    output = signal(knowledge, LABELS)

    chosen = [NAMES.index(view) for view in views]
    temperature = clip_temperature or CLIP_TEMPERATURE
    feature, clip = f64(knowledge.feature)[:, chosen], f64(knowledge.clip_embedding)[:, chosen]
    bank = f64(constants.text_bank)[chosen]
    similarity = reference.view_similarities(clip, bank)
    score = reference.view_scores(similarity, LABELS.numpy(), weighting, temperature)
    weights = reference.softmax(score / FUSION_TEMPERATURE)
    fused = reference.fuse(feature, weights)
    expected = {
        "view_weights": weights,
        "feature": fused,
        "logits": reference.linear(fused, f64(constants.head_weight), f64(constants.head_bias)),
        "clip_embedding": reference.normalize(reference.fuse(clip, weights)),
        "text_bank": bank,
        "text_logits": reference.fuse(similarity, weights) / temperature,
    }
    for name, value in expected.items():
        actual = getattr(output, name)
        assert actual.dtype == torch.float32
        np.testing.assert_allclose(f64(actual), value, rtol=1e-4, atol=1e-5, err_msg=name)


@every_weighting
def test_fused_logits_of_a_linear_head_are_the_fusion_of_the_logits(
    knowledge: Knowledge, constants: TeacherConstants, weighting: Weighting
) -> None:
    output = TeachingSignal(constants, NAMES, weighting, FUSION_TEMPERATURE)(knowledge, LABELS)
    logits_BVC = knowledge.feature @ constants.head_weight.T + constants.head_bias
    torch.testing.assert_close(fuse(logits_BVC, output.view_weights), output.logits, rtol=1e-4, atol=1e-5)


def test_uniform_weighting_is_constant_whatever_the_knowledge(
    knowledge: Knowledge, constants: TeacherConstants
) -> None:
    output = TeachingSignal(constants, NAMES, "uniform", FUSION_TEMPERATURE)(knowledge, LABELS)
    torch.testing.assert_close(output.view_weights, torch.full((BATCH, VIEWS), 1 / VIEWS))
    torch.testing.assert_close(output.feature, knowledge.feature.mean(dim=1))


@every_weighting
@pytest.mark.parametrize("view", NAMES)
def test_the_plain_teacher_is_one_view_as_it_is(
    knowledge: Knowledge, constants: TeacherConstants, weighting: Weighting, view: str
) -> None:
    output = TeachingSignal(constants, (view,), weighting, FUSION_TEMPERATURE)(knowledge, LABELS)
    position = NAMES.index(view)
    feature = knowledge.feature[:, position]
    assert torch.equal(output.view_weights, torch.ones(BATCH, 1))
    assert torch.equal(output.feature, feature)
    torch.testing.assert_close(output.logits, feature @ constants.head_weight.T + constants.head_bias)
    assert knowledge.clip_embedding is not None
    torch.testing.assert_close(output.clip_embedding, knowledge.clip_embedding[:, position])


MAP_SHAPES = ((2, 4, 4), (3, 2, 1))


@pytest.fixture
def with_maps(knowledge: Knowledge) -> Knowledge:
    generator = torch.Generator().manual_seed(5)
    after, before = (tuple(normal(generator, BATCH, VIEWS, *shape) for shape in MAP_SHAPES) for _ in range(2))
    return Knowledge(knowledge.feature, knowledge.clip_embedding, after, before)


@pytest.mark.parametrize("views", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_fused_by_the_same_weights(
    with_maps: Knowledge, constants: TeacherConstants, views: tuple[str, ...], dtype: torch.dtype
) -> None:
    chosen = [NAMES.index(view) for view in views]
    for field in ("feature_maps", "preactivation_maps"):
        setattr(with_maps, field, tuple(value.to(dtype) for value in getattr(with_maps, field)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = TeachingSignal(constants, views, "label", FUSION_TEMPERATURE)(with_maps, LABELS)
    weights = f64(output.view_weights)
    for field in ("feature_maps", "preactivation_maps"):
        fused = getattr(output, field)
        assert len(fused) == len(MAP_SHAPES)
        for stage, shape, actual in zip(getattr(with_maps, field), MAP_SHAPES, fused, strict=True):
            flat = f64(stage.float())[:, chosen].reshape(BATCH, len(views), -1)
            assert actual.dtype == torch.float32
            assert actual.shape == (BATCH, *shape)
            expected = reference.fuse(flat, weights).reshape(BATCH, *shape)
            np.testing.assert_allclose(f64(actual), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("view", NAMES)
def test_maps_of_one_view_are_handed_on_as_they_are(
    with_maps: Knowledge, constants: TeacherConstants, view: str
) -> None:
    output = TeachingSignal(constants, (view,), "label", FUSION_TEMPERATURE)(with_maps, LABELS)
    assert with_maps.feature_maps is not None
    assert output.feature_maps is not None
    for stage, actual in zip(with_maps.feature_maps, output.feature_maps, strict=True):
        assert torch.equal(actual, stage[:, NAMES.index(view)])
        assert actual.untyped_storage().data_ptr() == stage.untyped_storage().data_ptr(), "no copy"


def test_a_teacher_that_does_not_tell_some_maps(
    with_maps: Knowledge, knowledge: Knowledge, constants: TeacherConstants
) -> None:
    signal = TeachingSignal(constants, NAMES, "label", FUSION_TEMPERATURE)
    with_maps.preactivation_maps = ()
    assert signal(with_maps, LABELS).preactivation_maps == ()
    output = signal(knowledge, LABELS)
    assert output.feature_maps is output.preactivation_maps is None


@pytest.mark.parametrize(("views", "weighting"), [(NAMES, "uniform"), (("original",), "label")])
def test_without_a_text_teacher(
    knowledge: Knowledge, without_text: TeacherConstants, views: tuple[str, ...], weighting: Weighting
) -> None:
    output = TeachingSignal(without_text, views, weighting, FUSION_TEMPERATURE)(
        Knowledge(knowledge.feature), LABELS
    )
    feature = knowledge.feature[:, : len(views)].mean(dim=1)
    torch.testing.assert_close(output.feature, feature)
    torch.testing.assert_close(output.logits, feature @ without_text.head_weight.T + without_text.head_bias)
    torch.testing.assert_close(output.view_weights, torch.full((BATCH, len(views)), 1 / len(views)))
    assert output.clip_embedding is output.text_bank is output.text_logits is None


@every_weighting
def test_the_order_of_the_views_does_not_matter(
    knowledge: Knowledge, constants: TeacherConstants, weighting: Weighting
) -> None:
    order = [2, 0, 1]
    forward = TeachingSignal(constants, NAMES, weighting, FUSION_TEMPERATURE)(knowledge, LABELS)
    names = tuple(NAMES[v] for v in order)
    reordered = TeachingSignal(constants, names, weighting, FUSION_TEMPERATURE)(knowledge, LABELS)
    torch.testing.assert_close(reordered.view_weights, forward.view_weights[:, order])
    for name in ("logits", "feature", "clip_embedding", "text_logits"):
        torch.testing.assert_close(getattr(reordered, name), getattr(forward, name))


@every_weighting
def test_each_image_is_fused_by_itself(
    knowledge: Knowledge, constants: TeacherConstants, weighting: Weighting
) -> None:
    signal = TeachingSignal(constants, NAMES, weighting, FUSION_TEMPERATURE)
    whole = signal(knowledge, LABELS)
    assert knowledge.clip_embedding is not None
    for b in range(BATCH):
        alone = signal(
            Knowledge(knowledge.feature[b : b + 1], knowledge.clip_embedding[b : b + 1]), LABELS[b : b + 1]
        )
        for name in ("logits", "feature", "view_weights", "clip_embedding", "text_logits"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[b])


@every_weighting
def test_stored_float16_is_read_as_the_same_numbers_in_float32(
    knowledge: Knowledge, constants: TeacherConstants, weighting: Weighting
) -> None:
    assert knowledge.clip_embedding is not None
    stored = Knowledge(knowledge.feature.half(), knowledge.clip_embedding.half())
    assert stored.clip_embedding is not None
    signal = TeachingSignal(constants, NAMES, weighting, FUSION_TEMPERATURE)
    output = signal(stored, LABELS)
    exact = signal(Knowledge(stored.feature.float(), stored.clip_embedding.float()), LABELS)
    for name in ("logits", "feature", "view_weights", "clip_embedding", "text_logits"):
        assert getattr(output, name).dtype == torch.float32
        assert torch.equal(getattr(output, name), getattr(exact, name))


@every_weighting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_teaching_signal(
    knowledge: Knowledge, constants: TeacherConstants, weighting: Weighting, dtype: torch.dtype
) -> None:
    signal = TeachingSignal(constants, NAMES, weighting, FUSION_TEMPERATURE)
    exact = signal(knowledge, LABELS)
    with torch.autocast("cpu", dtype=dtype):
        output = signal(knowledge, LABELS)
    for name in ("logits", "feature", "view_weights", "clip_embedding", "text_logits"):
        assert getattr(output, name).dtype == torch.float32
        assert torch.equal(getattr(output, name), getattr(exact, name)), name


@every_weighting
@pytest.mark.parametrize("fusion_temperature", [1e-6, 1e6])
def test_finite_at_the_ends_of_the_temperatures(
    knowledge: Knowledge, constants: TeacherConstants, weighting: Weighting, fusion_temperature: float
) -> None:
    large = Knowledge(knowledge.feature * 6e4, knowledge.clip_embedding)
    output = TeachingSignal(constants, NAMES, weighting, fusion_temperature, 1e-3)(large, LABELS)
    for name in ("logits", "feature", "view_weights", "clip_embedding", "text_logits"):
        assert getattr(output, name).isfinite().all()


def test_no_gradient_reaches_the_teacher(with_maps: Knowledge, constants: TeacherConstants) -> None:
    assert with_maps.clip_embedding is not None
    assert with_maps.feature_maps is not None
    with_maps.feature.requires_grad_()
    with_maps.clip_embedding.requires_grad_()
    for value in with_maps.feature_maps:
        value.requires_grad_()
    output = TeachingSignal(constants, NAMES, "label", FUSION_TEMPERATURE)(with_maps, LABELS)
    assert output.feature_maps is not None
    told = [value for value in vars(output).values() if isinstance(value, torch.Tensor)]
    assert len(told) == 6
    assert not any(value.requires_grad for value in (*told, *output.feature_maps))


def test_the_signal_has_nothing_to_train_or_save(constants: TeacherConstants) -> None:
    signal = TeachingSignal(constants, NAMES, "label", FUSION_TEMPERATURE)
    assert list(signal.parameters()) == []
    assert signal.state_dict() == {}


def test_unknown_views_are_all_named(constants: TeacherConstants) -> None:
    with pytest.raises(
        UserError, match=r"distiller\.views: saliency, phase not in the knowledge.*original, edge"
    ):
        TeachingSignal(constants, ("saliency", "edge", "phase"), "label", FUSION_TEMPERATURE)


@semantic_weighting
def test_semantic_weights_need_a_text_teacher(without_text: TeacherConstants, weighting: Weighting) -> None:
    with pytest.raises(UserError, match=rf"distiller\.weighting={weighting} needs a text teacher.*uniform"):
        TeachingSignal(without_text, NAMES, weighting, FUSION_TEMPERATURE)

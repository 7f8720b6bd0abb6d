"""How accurate the teachers are, against NumPy in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from knowledge_chain import Chain, digits_chain

from tmkd_ray.augmentation import PARAMETERS
from tmkd_ray.fusion import TeacherConstants, Weighting
from tmkd_ray.knowledge.layout import KnowledgeLayout
from tmkd_ray.knowledge.quality import measure_quality
from tmkd_ray.knowledge.store import KnowledgeArrays, KnowledgeStore

N, K, V, C, D, E = 400, 2, 3, 5, 6, 7
VIEWS = ("original", "edge", "high_frequency")
FUSION_TEMPERATURE, CLIP_TEMPERATURE = 0.3, 0.2


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    exponential = np.exp(values - values.max(axis=axis, keepdims=True))
    return exponential / exponential.sum(axis=axis, keepdims=True)


@pytest.fixture(scope="module")
def constants() -> TeacherConstants:
    rng = np.random.default_rng(0)
    return TeacherConstants(
        VIEWS,
        torch.from_numpy(rng.normal(size=(C, D))).float(),
        torch.from_numpy(rng.normal(size=C)).float(),
        torch.from_numpy(unit(rng.normal(size=(V, C, E)))).float(),
        CLIP_TEMPERATURE,
    )


@pytest.fixture(scope="module")
def arrays(constants: TeacherConstants) -> KnowledgeArrays:
    """Views of unequal worth; class 4 has no image; the second variant is nonsense."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, C - 1, N)
    noise = np.array([0.5, 1.0, 2.0])[None, :, None]
    feature = constants.head_weight.numpy()[labels][:, None] + noise * rng.normal(size=(N, V, D))
    assert constants.text_bank is not None
    text = constants.text_bank.numpy()[:, labels].transpose(1, 0, 2)
    clip = unit(text + 0.5 * noise * rng.normal(size=(N, V, E)))
    return KnowledgeArrays(
        KnowledgeLayout(VIEWS, K, 8, D, E),
        ids=np.array([str(i) for i in range(N)]),
        labels=labels,
        images=np.zeros((N, 8, 8, 3), np.uint8),
        augmentation=np.zeros((N, K, len(PARAMETERS)), np.int16),
        feature=np.stack([feature, -feature], axis=1).astype(np.float16),
        clip_embedding=np.stack([clip, -clip], axis=1).astype(np.float16),
    )


def view_logits(arrays: KnowledgeArrays, constants: TeacherConstants) -> np.ndarray:
    """Return float64 [N, V, C] over the first variant."""
    return (
        arrays.feature[:, 0].astype(np.float64) @ constants.head_weight.double().numpy().T
        + constants.head_bias.double().numpy()
    )


def check_common(quality: object, arrays: KnowledgeArrays, constants: TeacherConstants) -> None:
    logits = view_logits(arrays, constants)
    right_NV = logits.argmax(2) == arrays.labels[:, None]
    assert quality.views == pytest.approx(dict(zip(VIEWS, right_NV.mean(0), strict=True)))  # type: ignore[attr-defined]
    uniform = (logits.mean(1).argmax(1) == arrays.labels).mean()
    assert quality.fused["uniform"] == pytest.approx(uniform)  # type: ignore[attr-defined]
    assert quality.fused["oracle"] == pytest.approx(right_NV.any(1).mean())  # type: ignore[attr-defined]
    assert 0.3 < right_NV.mean() < 0.99, "neither hopeless nor perfect, so that the comparison says something"


@pytest.mark.parametrize("weighting", ["label", "confidence"])
def test_with_clip(weighting: Weighting, arrays: KnowledgeArrays, constants: TeacherConstants) -> None:
    quality = measure_quality(arrays, constants, weighting, FUSION_TEMPERATURE, None)
    check_common(quality, arrays, constants)
    assert arrays.clip_embedding is not None
    assert constants.text_bank is not None
    clip = arrays.clip_embedding[:, 0].astype(np.float64)
    similarity_NVC = np.einsum("nve,vce->nvc", clip, constants.text_bank.double().numpy())
    if weighting == "label":
        score_NV = similarity_NVC[np.arange(N), :, arrays.labels]
    else:
        score_NV = softmax(similarity_NVC / CLIP_TEMPERATURE, 2).max(2)
    weight_NV = softmax(score_NV / FUSION_TEMPERATURE, 1)
    semantic = np.einsum("nv,nvc->nc", weight_NV, view_logits(arrays, constants)).argmax(1)
    assert set(quality.fused) == {"uniform", "semantic", "oracle"}
    assert quality.fused["semantic"] == pytest.approx((semantic == arrays.labels).mean())
    zero_shot = {name: (similarity_NVC[:, v].argmax(1) == arrays.labels).mean() for v, name in enumerate(VIEWS)}
    fused = similarity_NVC.mean(1).argmax(1)  # uniform weights: zero-shot is not told the label
    zero_shot["fused"] = (fused == arrays.labels).mean()
    assert quality.zero_shot == pytest.approx(zero_shot)
    assert len(set(zero_shot.values())) > 2
    for label in range(C - 1):
        expected = weight_NV[arrays.labels == label].mean(0)
        np.testing.assert_allclose(quality.weights_per_class[label], expected, atol=1e-5)
    assert quality.weights_per_class[C - 1] == [0, 0, 0]


def test_temperature_of_clip(arrays: KnowledgeArrays, constants: TeacherConstants) -> None:
    """None takes CLIP's own; another one changes the weights that read it."""
    own = measure_quality(arrays, constants, "confidence", FUSION_TEMPERATURE, None)
    same = measure_quality(arrays, constants, "confidence", FUSION_TEMPERATURE, CLIP_TEMPERATURE)
    other = measure_quality(arrays, constants, "confidence", FUSION_TEMPERATURE, 5.0)
    assert own == same
    assert own.weights_per_class != other.weights_per_class


def test_without_clip(arrays: KnowledgeArrays, constants: TeacherConstants) -> None:
    plain = replace(arrays, clip_embedding=None)
    visual_only = replace(constants, text_bank=None, clip_temperature=None)
    quality = measure_quality(plain, visual_only, "label", FUSION_TEMPERATURE, None)
    check_common(quality, arrays, constants)
    assert set(quality.fused) == {"uniform", "oracle"}
    assert quality.zero_shot == {}
    np.testing.assert_allclose(quality.weights_per_class[:4], np.full((4, 3), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("with_clip", [True, False])
def test_of_a_real_store(with_clip: bool, chain: Chain, store: KnowledgeStore, tmp_path: Path) -> None:
    """Straight from a store's arrays, both splits, whose tensors come as they are read."""
    if not with_clip:
        chain = digits_chain(None)
        store = chain.write(tmp_path)
    key = None
    if chain.clip is not None:
        names = chain.dataset.class_names
        bank = chain.clip.text_bank([["a photo of a {}."]] * 3, names)
        store = KnowledgeStore(str(tmp_path))
        chain.write(tmp_path)
        store.write_text_bank("bank", bank, chain.clip.temperature)
        key = "bank"
    for split in ("train", "validation"):
        arrays = store.read(split)
        quality = measure_quality(arrays, store.constants(key), "label", 0.1, None)
        logits = view_logits(arrays, store.constants(key))
        expected = (logits.argmax(2) == arrays.labels[:, None]).mean(0)
        assert list(quality.views.values()) == pytest.approx(expected.tolist())
        assert ("semantic" in quality.fused) == with_clip


def test_views_left_out_of_the_fusion_weigh_nothing(
    arrays: KnowledgeArrays, constants: TeacherConstants
) -> None:
    whole = measure_quality(arrays, constants, "label", FUSION_TEMPERATURE, None)
    part = measure_quality(arrays, constants, "label", FUSION_TEMPERATURE, None, VIEWS[1:])
    assert (part.views, part.fused["oracle"]) == (whole.views, whole.fused["oracle"])
    uniform = (view_logits(arrays, constants)[:, 1:].mean(1).argmax(1) == arrays.labels).mean()
    assert part.fused["uniform"] == pytest.approx(uniform)
    weights_CV = np.array(part.weights_per_class)[: C - 1]
    assert (weights_CV[:, 0] == 0).all()
    np.testing.assert_allclose(weights_CV.sum(1), 1.0, atol=1e-6)

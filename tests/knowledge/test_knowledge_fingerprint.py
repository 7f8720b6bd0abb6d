"""A store is reused exactly when it fits, and a refusal names every difference."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from knowledge_chain import FINGERPRINT, Chain, contents

from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import KnowledgeMismatchError, UserError
from tmkd_ray.knowledge.fingerprint import check_match, differences, flatten
from tmkd_ray.knowledge.store import KnowledgeStore
from tmkd_ray.teachers import VisualTeacher

STORED: dict[str, Any] = {
    "version": 1,
    "views": {"edge": {"strength": 0.1, "operator": "sobel"}, "original": {"version": 1}},
    "view_order": ("original", "edge"),
    "text_teacher": {"weights": "a" * 64},
}


def test_flatten() -> None:
    assert flatten(STORED) == {
        "version": 1,
        "views.edge.strength": 0.1,
        "views.edge.operator": "sobel",
        "views.original.version": 1,
        "view_order": ("original", "edge"),
        "text_teacher.weights": "a" * 64,
    }


def test_equal_fingerprints_match() -> None:
    assert differences(STORED, STORED) == []
    assert differences({**STORED, "view_order": ["original", "edge"]}, STORED) == []
    check_match(STORED, STORED, "somewhere")


def test_every_difference_is_named() -> None:
    wanted = {
        "version": 2,
        "views": {"edge": {"strength": 0.3, "operator": "sobel"}, "high_frequency": {"cutoff": 0.5}},
        "view_order": ("original", "high_frequency"),
        "text_teacher": None,
    }
    assert differences(STORED, wanted) == [
        "text_teacher.weights: store aaaaaaaaaaaa…, config (none)",
        "version: store 1, config 2",
        "view_order: store ['original', 'edge'], config ['original', 'high_frequency']",
        "views.edge.strength: store 0.1, config 0.3",
        "views.high_frequency.cutoff: store (none), config 0.5",
        "views.original.version: store 1, config (none)",
    ]
    with pytest.raises(KnowledgeMismatchError) as caught:
        check_match(STORED, wanted, "/data/store")
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "/data/store" in message
    assert "knowledge.path" in message
    for line in differences(STORED, wanted):
        assert line in message


def test_a_claimed_folder_takes_nothing_else(chain: Chain, tmp_path: Path) -> None:
    """Neither a whole store nor an interrupted one is mixed with another configuration's shards."""
    store = KnowledgeStore(str(tmp_path))
    assert store.fingerprint() is None
    store.begin(FINGERPRINT)
    chain.compute(chain.plans()[:2], store)
    before = contents(tmp_path)
    other = {**FINGERPRINT, "views": {"edge": {"strength": 0.7}}, "dtype": "float32"}
    with pytest.raises(KnowledgeMismatchError) as caught:
        KnowledgeStore(str(tmp_path)).begin(other)
    assert "views.edge.strength: store 0.5, config 0.7" in str(caught.value)
    assert "dtype: store (none), config float32" in str(caught.value)
    assert contents(tmp_path) == before
    KnowledgeStore(str(tmp_path)).begin(FINGERPRINT)
    assert contents(tmp_path) == before


def test_a_finished_store_stays_claimed(chain: Chain, tmp_path: Path) -> None:
    """Though not one of its shards is left."""
    store = chain.write(tmp_path)
    for split in ("train", "validation"):
        shutil.rmtree(tmp_path / split)
    with pytest.raises(KnowledgeMismatchError):
        store.begin({**FINGERPRINT, "version": 2})
    store.begin(FINGERPRINT)


def test_knowledge_of_unknown_origin_is_not_gone_on_with(chain: Chain, tmp_path: Path) -> None:
    store = KnowledgeStore(str(tmp_path))
    store.begin(FINGERPRINT)
    chain.compute(chain.plans()[:1], store)
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(UserError, match=rf"{tmp_path}/fingerprint\.json is missing.*delete the folder"):
        store.begin(FINGERPRINT)
    assert not (tmp_path / "fingerprint.json").exists()


@pytest.fixture(scope="module")
def wanted(chain: Chain) -> Any:
    """The fingerprint of a configuration: made by the stage, which imports Ray; none is started."""
    from tmkd_ray.stages.experiment import open_experiment
    from tmkd_ray.stages.knowledge import fingerprint

    def of(*overrides: str, visual: VisualTeacher = chain.visual) -> dict[str, Any]:
        config = read_config(None, ["dataset=digits", "dataset.limit=100", *overrides])
        return fingerprint(open_experiment(config), visual, chain.clip)

    return of


@pytest.mark.parametrize(
    "override",
    [
        'views.edge.prompts=["an edgy {}"]',
        "distiller.fusion_temperature=0.5",
        "distiller.clip_temperature=0.5",
        "distiller.weighting=margin",
        "distiller.kd_weight=0.2",
        "distiller.strategy=dkd",
        "student.model=resnet20",
        "training.epochs=3",
        "training.seed=9",
        "knowledge.visual.max_size=4",
        "output=elsewhere",
        "dataset.mean=[0.1, 0.1, 0.1]",
    ],
)
def test_what_does_not_invalidate_a_store(override: str, wanted: Any) -> None:
    expected = wanted("teacher.visual.mean=[0.3, 0.3, 0.3]")
    assert differences(expected, wanted("teacher.visual.mean=[0.3, 0.3, 0.3]", override)) == []


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("dataset.limit=90", "dataset.num_train"),
        ("dataset.image_size=16", "dataset.image_size"),
        ("dataset.split_seed=1", "dataset.samples"),
        ("augmentation.padding=2", "augmentation.padding"),
        ("augmentation.recipe=none", "augmentation.recipe"),
        ("knowledge.num_variants=2", "augmentation.num_variants"),
        ("knowledge.seed=1", "augmentation.seed"),
        ("knowledge.dtype=float32", "dtype"),
        ("knowledge.shard_rows=10", "shard_rows"),
        ("knowledge.visual.batch_size=3", "visual_teacher.batch_size"),
        ("knowledge.text.precision=bfloat16", "text_teacher.precision"),
        ("teacher.visual.model=resnet8", "visual_teacher.model"),
        ("views.edge.strength=0.9", "views.edge.strength"),
        ("views=[edge, original, high_frequency]", "view_order"),
        ("views=[original, edge]", "view_order"),
    ],
)
def test_what_invalidates_a_store(override: str, name: str, wanted: Any) -> None:
    lines = differences(wanted(), wanted(override))
    assert any(line.startswith(f"{name}: ") for line in lines), lines


def test_another_teacher_invalidates_a_store(wanted: Any, chain: Chain) -> None:
    moved = copy.deepcopy(chain.visual)
    moved.model.head.bias[0] += 1
    lines = differences(wanted(), wanted(visual=moved))
    assert [line.partition(":")[0] for line in lines] == ["visual_teacher.weights"]
    assert differences(wanted(), wanted(visual=copy.deepcopy(chain.visual))) == []

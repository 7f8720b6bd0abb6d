from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from tmkd_ray.report import figures
from tmkd_ray.results import EpochRecord


def record(epoch, value):
    return EpochRecord(
        epoch=epoch, learning_rate=0.1, loss=value, validation_accuracy=0.5, seconds=1.0, images_per_second=1.0
    )


def lines_of(monkeypatch, draw):
    """What `draw` plots: the lines and bands of its axes."""
    seen = []
    original = figures.inline_svg

    def spy(name, description, height, paint, **sizes):
        def keep(axes):
            paint(axes)
            seen.append(axes)

        return original(name, description, height, keep, **sizes)

    monkeypatch.setattr(figures, "inline_svg", spy)
    draw()
    return seen[0]


def test_curves_are_the_mean_and_the_range_of_the_seeds(monkeypatch, make_method):
    method = make_method("a", [0.9, 0.9])
    runs = [
        run.model_copy(update={"history": history})
        for run, history in zip(
            method.runs,
            # The second run stops early and diverges in epoch 1.
            ([record(1, 4.0), record(2, 3.0), record(3, 2.0)], [record(1, float("nan")), record(2, 1.0)]),
            strict=True,
        )
    ]
    methods = [method.model_copy(update={"runs": runs})]
    axes = lines_of(monkeypatch, lambda: figures.method_curves("x", methods, lambda r: r.loss, "Loss"))
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 4], [2, 2], [3, 2]])
    band = axes.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band.tolist()} == {(1, 4), (2, 1), (2, 3), (3, 2)}


def test_a_value_that_no_method_has_gives_no_figure(make_method):
    methods = [make_method("a", [0.9])]
    assert figures.method_curves("x", methods, lambda record: record.terms.get("kd"), "kd") is None
    assert figures.history_curves("x", {"loss": ([], [])}, "Loss") is None


def test_seeds_mean_and_deviation_stand_where_they_should(monkeypatch, make_method):
    methods = [make_method("a", [0.90, 0.92, 0.94])]
    axes = lines_of(monkeypatch, lambda: figures.accuracy_by_seed(methods, "test", 0.97))
    points = [line.get_xdata() for line in axes.lines]
    assert any(len(x) == 3 and np.allclose(np.sort(x), [90, 92, 94]) for x in points)
    segment = axes.collections[0].get_segments()[0]
    np.testing.assert_allclose(segment[:, 0], [90, 94])
    assert axes.get_xlim()[1] > 97


def test_extreme_classes():
    weights = np.full((50, 2), 0.5)
    weights[7] = [1.0, 0.0]
    weights[31] = [0.2, 0.8]
    farthest, nearest = figures.extreme_classes(weights)
    assert farthest[:2] == [7, 31]
    assert len(farthest) == len(nearest) == figures.NUM_EXTREME_CLASSES
    assert not {7, 31} & set(nearest)


def test_stacked_bars_reach_one(monkeypatch):
    weights = np.random.default_rng(0).dirichlet([1, 1, 1], size=4)
    axes = lines_of(
        monkeypatch,
        lambda: figures.semantic_weights(
            "x", weights_CV=weights, labels=[2, 0], class_names=list("abcd"), views=["u", "v", "w"]
        ),
    )
    bars = np.array([bar.get_width() for bar in axes.patches]).reshape(3, 3).T
    np.testing.assert_allclose(bars, [weights.mean(axis=0), weights[2], weights[0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mean of 4", "c", "a"]


@pytest.mark.parametrize(
    "name", ["<script>", "a$b$\\frac{", "猫", "a\x00\x0bb", 'x" id="y', "%d {0}", "\udcff"]
)
def test_any_class_name_can_be_drawn(name):
    svg = figures.semantic_weights(
        "x", weights_CV=np.array([[0.5, 0.5]]), labels=[0], class_names=[name], views=["u", "v"]
    )
    texts = [node.text for node in ElementTree.fromstring(svg).iter("text")]
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    assert shown in texts


def test_colours_follow_the_theme(make_method):
    svg = figures.accuracy_by_seed([make_method("a", [0.9, 0.91])], "test", 0.95)
    assert "var(--ink)" in svg
    assert "var(--grid)" in svg
    # No black or white that would vanish in one of the themes, and no sentinel left.
    for colour in ("#000000", "#ffffff", "#010203", "#040506", "#070809"):
        assert colour not in svg


def test_drawing_leaves_matplotlib_as_it_was(make_method):
    before = dict(matplotlib.rcParams)
    figures.accuracy_by_seed([make_method("a", [0.9])], "test", None)
    assert dict(matplotlib.rcParams) == before


def test_styles_differ_between_methods():
    swatches = {figures.method_swatch(index, "x") for index in range(21)}
    assert len(swatches) == 21

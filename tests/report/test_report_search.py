"""The page of a sweep, and the importance of its parameters."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest

from tmkd_ray.report.importance import parameter_importance
from tmkd_ray.report.search import summarise_sweep, write_search_report
from tmkd_ray.results import EpochRecord
from tmkd_ray.trials import Sweep, SweepRecord, TrialRecord


def made_sweep(num_trials=40, noise=0.0, **changes):
    """Accuracy hangs on the temperature's logarithm much, on the strategy a little, on momentum not at all."""
    generator = np.random.default_rng(0)
    trials = []
    for number in range(num_trials):
        temperature = float(10 ** generator.uniform(-2, 0))
        strategy = ["kd", "dkd", "dist"][int(generator.integers(3))]
        accuracy = 0.5 + 0.3 * math.exp(-((math.log10(temperature) + 1) ** 2) * 4) + 0.05 * (strategy == "dkd")
        accuracy += noise * generator.standard_normal()
        history = [
            EpochRecord(
                epoch=epoch,
                learning_rate=0.1,
                loss=1.0,
                validation_accuracy=float(np.clip(accuracy * (0.7 + 0.1 * epoch), 0, 1)),
                seconds=5.0,
                images_per_second=10.0,
            )
            for epoch in range(1, 2 if number % 5 == 4 else 4)
        ]
        trials.append(
            TrialRecord(
                key=f"k{number}",
                number=number,
                parameters={
                    "distiller.fusion_temperature": temperature,
                    "distiller.strategy": strategy,
                    "training.momentum": float(generator.uniform(0.5, 0.9)),
                },
                seed=0,
                store="s",
                status="stopped" if number % 5 == 4 else "finished",
                epochs=3,
                history=history,
                started=60.0 * number,
                ended=60.0 * number + 55,
                latency_ms=float(2 + 5 * accuracy + generator.uniform(0, 1)),
            )
        )
    record = SweepRecord(
        name="a <sweep>",
        key="k",
        folder="/f",
        created="2026-01-01T00:00:00+00:00",
        dataset="digits",
        student="resnet8",
        epochs=3,
        num_trials=num_trials,
        parameters={
            "distiller.fusion_temperature": {"loguniform": [0.01, 1]},
            "distiller.strategy": {"choice": ["kd", "dkd", "dist"]},
            "training.momentum": {"uniform": [0.5, 0.9]},
        },
        searcher="random",
        scheduler="asha",
        objectives=("validation_accuracy", "latency"),
        config={"training": {"epochs": 3}},
        versions={"python": "3.11"},
    ).model_copy(update=changes)
    return Sweep(record=record, trials=trials)


def test_importance_finds_what_decides():
    found = parameter_importance(
        made_sweep(num_trials=100).model_copy(
            update={"trials": [t for t in made_sweep(num_trials=100).trials if t.status == "finished"]}
        )
    )
    assert list(found.shares) == ["distiller.fusion_temperature", "distiller.strategy", "training.momentum"]
    assert found.shares["distiller.fusion_temperature"] > 0.8
    assert found.shares["training.momentum"] < 0.05
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.explained > 0.6
    assert found.num_trials == 80


def test_importance_of_noise_is_not_claimed():
    generator = np.random.default_rng(1)
    base = made_sweep(num_trials=30)
    trials = [
        trial.model_copy(
            update={
                "history": [
                    trial.history[0].model_copy(
                        update={"validation_accuracy": float(generator.uniform(0.4, 0.6))}
                    )
                ]
            }
        )
        for trial in base.trials
    ]
    assert parameter_importance(base.model_copy(update={"trials": trials})).explained < 0.1


def test_few_or_equal_trials_have_no_importance():
    assert parameter_importance(made_sweep(num_trials=7)) is None
    base = made_sweep(num_trials=10)
    equal = [trial.model_copy(update={"history": base.trials[0].history}) for trial in base.trials]
    found = parameter_importance(base.model_copy(update={"trials": equal}))
    assert set(found.shares.values()) == {0.0}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.anchors, self.figures, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "section":
            self.anchors.append(found["id"])
        if tag == "svg" and "aria-label" in found:
            self.figures.append(found["aria-label"])
        self.links += [
            value
            for name, value in attributes
            if name in ("href", "src") and not value.startswith(("#", "data:"))
        ]


def test_the_page_has_all_figures_and_needs_no_network(tmp_path):
    write_search_report(str(tmp_path / "search.html"), made_sweep())
    text = (tmp_path / "search.html").read_text()
    page = Page(text)
    assert page.anchors == ["outcome", "values", "time", "latency", "setup"]
    assert page.figures == [
        "each trial's values and accuracy as a line",
        "importance of each parameter",
        "validation accuracy of the trials over time",
        "validation accuracy of each trial by epoch",
        "validation accuracy against latency",
    ]
    assert page.links == []
    assert "a &lt;sweep&gt;" in text
    assert "random forest" in text


def test_a_page_without_a_finished_trial_is_written_too(tmp_path):
    base = made_sweep(num_trials=2)
    trials = [
        base.trials[0].model_copy(update={"status": "failed", "error": "out of memory", "history": []}),
        base.trials[1].model_copy(update={"status": "running", "history": []}),
    ]
    found = base.model_copy(update={"trials": trials})
    write_search_report(str(tmp_path / "search.html"), found)
    assert Page((tmp_path / "search.html").read_text()).anchors == ["outcome", "failed", "setup"]
    assert "None was trained to an end" in summarise_sweep(found)


def test_the_summary_says_what_the_figure_is_worth():
    text = summarise_sweep(made_sweep())
    assert "flatters itself" in text
    assert "The test images were not read." in text

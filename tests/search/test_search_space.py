"""What a sweep may search: everything wrong is told at once, before anything starts."""

import math

import numpy as np
import pytest

from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import ConfigError
from tmkd_ray.search.space import check_space, store_key, sweep_folder, trial_config
from tmkd_ray.search.suggest import OptunaSuggestions, planned_trials, total_trials


def config(parameters, *overrides, **search):
    tree = {"parameters": parameters, **search}
    return read_config(
        None, ["dataset=digits", f"search={tree!r}".replace("'", '"').replace("None", "null"), *overrides]
    )


def space(parameters, *overrides, **search):
    return check_space(config(parameters, *overrides, **search))


def test_a_right_space_passes_and_needs_one_store():
    found = space(
        {
            "distiller.fusion_temperature": {"loguniform": [0.01, 1.0]},
            "training.learning_rate": {"uniform": [0.001, 0.1]},
            "training.epochs": {"randint": [1, 5]},
            "distiller.strategy": {"choice": ["kd", {"name": "dkd"}]},
            "student.model": {"grid": ["resnet8", "resnet20"]},
        }
    )
    assert list(found.stores.values()) == [{}]


def test_all_problems_are_told_at_once_by_their_paths():
    with pytest.raises(ConfigError) as caught:
        space(
            {
                "distiller.fusion_temperatur": {"loguniform": [0.01, 1.0]},
                "training.momentum": {"uniform": [0.5, 1.5]},
                "training.epochs": {"uniform": [1, 4]},
                "student.model": {"choice": ["resnet8", "resnet7"]},
                "training.seed": {"randint": [0, 9]},
                "training.learning_rate.start": {"uniform": [0.1, 0.2]},
                "dataset.validation_fraction": {"uniform": [0.1, 0.2]},
                "methods.kd.kd_weight": {"uniform": [0.1, 0.2]},
            }
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "8 errors in the sweep:"
    told = {line.strip().partition(": ")[0].removeprefix("search.parameters."): line for line in lines[1:]}
    assert "did you mean 'distiller.fusion_temperature'" in told["distiller.fusion_temperatur"]
    assert "1.5: must be below 1" in told["training.momentum"]
    assert "expected a whole number" in told["training.epochs"]
    assert "resnet7" in told["student.model"]
    assert "luck" in told["training.seed"]
    assert "0.05, which has no keys" in told["training.learning_rate.start"]
    assert "validation images" in told["dataset.validation_fraction"]
    assert "distiller" in told["methods.kd.kd_weight"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"parameters": {}}, "search.parameters: has too few"),
        ({"parameters": {"a": {"uniform": [1, 0]}}}, "is not below"),
        ({"parameters": {"a": {"loguniform": [0, 1]}}}, "begins above 0"),
        ({"parameters": {"a": {"uniform": [0, 1], "choice": [1]}}}, "exactly one of"),
        ({"parameters": {"a": {"unform": [0, 1]}}}, "did you mean 'uniform'"),
        ({"parameters": {"a": {"choice": []}}}, "at least one value"),
        ({"parameters": {"a": {"choice": [1, 1]}}}, "each once"),
        ({"parameters": {"a": {"quniform": [0, 1, 2]}}}, "does not fit between"),
        ({"parameters": {"a": {"uniform": [0, 1]}}, "searcher": "grid"}, "searcher grid needs"),
        ({"parameters": {"a": {"uniform": [0, 1]}}, "objectives": "latency"}, "begin with validation_accuracy"),
        ({"parameters": {"a": {"uniform": [0, 1]}}, "scheduler": {"name": "asha", "quantile": 0.5}}, "of pbt"),
        ({"parameters": {"a": {"uniform": [0, 1]}}, "resources": {"gpus": 1.5}}, "neither a part"),
        ({"parameters": {"a": {"uniform": [0, 1]}}, "resources": {"gpus": 0.5, "workers": 2}}, "cannot share"),
        (
            {"parameters": {"a": {"uniform": [0, 1]}}, "scheduler": "pbt", "searcher": "optuna"},
            "pbt changes the trials by itself",
        ),
    ],
)
def test_a_wrong_section_is_a_clear_error(section, message):
    text = repr(section).replace("'", '"')
    with pytest.raises(ConfigError, match=message):
        read_config(None, ["dataset=digits", f"search={text}"])


def test_values_that_do_not_go_together_are_told():
    with pytest.raises(ConfigError, match=r"training\.warmup_epochs=5, training\.epochs=5 do not go together"):
        space({"training.warmup_epochs": {"choice": [0, 5]}, "training.epochs": {"choice": [20, 5]}})


def test_a_part_of_what_is_searched_whole_is_refused():
    with pytest.raises(ConfigError, match=r"lies within distiller\.strategy"):
        space(
            {
                "distiller.strategy": {"choice": ["kd", "dkd"]},
                "distiller.strategy.temperature": {"uniform": [1, 8]},
            }
        )


def test_no_section_is_a_clear_error():
    with pytest.raises(ConfigError, match="search: nothing is given"):
        check_space(read_config(None, ["dataset=digits"]))


def test_streaming_is_refused():
    with pytest.raises(ConfigError, match=r"knowledge\.mode: streaming"):
        space({"training.learning_rate": {"uniform": [0.01, 0.1]}}, "knowledge.mode=streaming")


# -- stores --------------------------------------------------------------------------------------------------


def test_each_store_that_is_needed_is_listed_once():
    parameters = {
        "views.edge.strength": {"choice": [0.2, 0.4]},
        "augmentation.flip": {"grid": [True, False]},
        "distiller.kd_weight": {"uniform": [0.1, 1]},
    }
    found = space(parameters)
    wanted = [
        {"views.edge.strength": strength, "augmentation.flip": flip}
        for strength in (0.2, 0.4)
        for flip in (True, False)
    ]
    assert list(found.stores.values()) == wanted
    for parameters in wanted:
        trial = trial_config(found.config, {**parameters, "distiller.kd_weight": 0.3})
        assert found.stores[store_key(trial)] == parameters


def test_a_continuum_of_stores_is_refused():
    with pytest.raises(
        ConfigError, match=r"search\.parameters\.views\.edge\.strength: needs the teachers again"
    ):
        space({"views.edge.strength": {"uniform": [0.1, 0.4]}})


def test_too_many_stores_are_refused():
    parameters = {
        "knowledge.num_variants": {"randint": [1, 7]},
        "views.edge.strength": {"choice": [0.1, 0.2, 0.3]},
    }
    with pytest.raises(ConfigError, match="need 18 knowledge stores"):
        space(parameters)


@pytest.mark.parametrize(
    "path_and_value",
    [
        ("training.epochs", 3),
        ("distiller.weighting", "uniform"),
        ("student.model", "resnet20"),
        ("training.batch_size", 8),
    ],
)
def test_what_needs_no_teacher_leaves_the_store(path_and_value):
    base = config({"training.learning_rate": {"uniform": [0.01, 0.1]}})
    path, value = path_and_value
    assert store_key(trial_config(base, {path: value})) == store_key(trial_config(base, {}))


# -- trials --------------------------------------------------------------------------------------------------


def test_a_trial_is_one_student_with_the_sweeps_resources():
    base = config(
        {"training.learning_rate": {"uniform": [0.01, 0.1]}},
        "methods={kd: kd}",
        "seeds=[1, 2]",
        "training.num_workers=2",
        "training.seed=7",
        resources={"workers": 1, "cpus": 2.0},
    )
    trial = trial_config(base, {"training.learning_rate": 0.025, "distiller.strategy": "dkd"})
    assert (trial.training.learning_rate, trial.distiller.strategy.name) == (0.025, "dkd")
    assert (trial.methods, trial.seeds, trial.search) == ({}, None, None)
    assert (trial.training.num_workers, trial.training.num_cpus_per_worker) == (1, 2.0)
    assert trial.training.seed == 7


def test_a_trial_that_is_refused_says_with_which_values():
    base = config({"training.epochs": {"choice": [20, 30]}})
    with pytest.raises(ConfigError, match=r"training\.momentum=2: .*|training.momentum=2 is refused"):
        trial_config(base, {"training.momentum": 2})


def test_a_longer_sweep_lies_in_the_same_folder_and_another_space_does_not():
    parameters = {"training.learning_rate": {"uniform": [0.01, 0.1]}}
    first = sweep_folder(space(parameters, num_trials=3))
    assert sweep_folder(space(parameters, num_trials=30, retries=4, max_concurrent_trials=1)) == first
    assert sweep_folder(space({"training.learning_rate": {"uniform": [0.01, 0.2]}})) != first
    assert sweep_folder(space(parameters, "training.epochs=3")) != first
    assert sweep_folder(space(parameters, scheduler="asha")) != first


# -- PBT -----------------------------------------------------------------------------------------------------


def test_pbt_takes_what_can_change_and_says_why_not_the_rest():
    assert space(
        {"training.learning_rate": {"loguniform": [1e-3, 0.1]}, "distiller.kd_weight": {"uniform": [0.1, 1]}},
        scheduler="pbt",
    )
    with pytest.raises(ConfigError) as caught:
        space(
            {
                "student.model": {"choice": ["resnet8", "resnet20"]},
                "training.batch_size": {"choice": [8, 16]},
                "distiller.text_weight": {"uniform": [0, 1]},
            },
            scheduler="pbt",
        )
    text = str(caught.value)
    assert text.startswith("3 errors")
    assert text.count("cannot change while a student trains") == 2
    assert "search.parameters.distiller.text_weight: a weight of 0" in text


# -- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ({"uniform": [2, 6]}, [2, 3, 4, 5, 6]),
        ({"loguniform": [1, 16]}, [1, 2, 4, 8, 16]),
        ({"quniform": [0, 1, 0.5]}, [0, 0, 0.5, 1, 1]),
        ({"qloguniform": [1, 16, 3]}, [1, 3, 3, 9, 15]),
        ({"randint": [0, 4]}, [0, 1, 2, 3, 3]),
        ({"lograndint": [1, 17]}, [1, 2, 4, 8, 16]),
        ({"choice": ["a", "b"]}, ["a", "a", "b", "b", "b"]),
    ],
)
def test_values_by_their_part_of_the_range(distribution, expected):
    found = config({"a": distribution}).search.parameters["a"]
    assert (
        [found.at(part) for part in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(expected)
        if distribution.keys() != {"choice"}
        else [found.at(part) for part in (0, 0.25, 0.5, 0.75, 1)] == expected
    )


def test_draws_follow_the_distributions():
    search = config(
        {
            "log": {"loguniform": [0.01, 1.0]},
            "whole": {"randint": [3, 6]},
            "name": {"choice": ["x", "y"]},
        },
        num_trials=600,
    ).search
    trials = planned_trials(search)
    assert len(trials) == 600
    logs = np.log10([trial["log"] for trial in trials])
    assert logs.min() >= -2
    assert logs.max() <= 0
    assert abs(logs.mean() + 1) < 0.1  # the mean of a uniform on [-2, 0] is -1, its standard error 0.024
    assert {trial["whole"] for trial in trials} == {3, 4, 5}
    assert all(isinstance(trial["whole"], int) for trial in trials)
    share = np.mean([trial["name"] == "x" for trial in trials])
    assert 0.42 < share < 0.58


def test_more_trials_begin_with_the_same():
    parameters = {"log": {"loguniform": [0.01, 1.0]}}
    few, many = (planned_trials(config(parameters, num_trials=n).search) for n in (3, 8))
    assert many[:3] == few
    assert len({trial["log"] for trial in many}) == 8
    assert planned_trials(config(parameters, num_trials=3, seed=1).search) != few


def test_a_grid_is_gone_through_whole_and_crossed_with_draws():
    parameters = {"a": {"grid": [1, 2]}, "b": {"grid": ["x", "y", "z"]}}
    wanted = [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y", "z")]
    assert planned_trials(config(parameters).search) == wanted
    assert planned_trials(config(parameters, searcher="grid").search) == wanted
    assert planned_trials(config(parameters, num_trials=4).search) == wanted[:4]
    crossed = config({**parameters, "c": {"uniform": [0, 1]}}, num_trials=2).search
    trials = planned_trials(crossed)
    assert len(trials) == 12 == total_trials(crossed)
    assert [{"a": t["a"], "b": t["b"]} for t in trials] == 2 * wanted
    assert len({t["c"] for t in trials}) == 12


SIX = {"a": {"choice": [{"x": 1}, "y"]}, "n": {"randint": [0, 3]}}
ALL_SIX = [{"a": a, "n": n} for a in ({"x": 1}, "y") for n in range(3)]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (SIX, ALL_SIX),
        ({"q": {"quniform": [0, 1, 0.5]}}, [{"q": q} for q in (0.0, 0.5, 1.0)]),
        (SIX | {"g": {"grid": [7, 8]}}, [six | {"g": g} for six in ALL_SIX for g in (7, 8)]),
    ],
)
def test_no_values_are_drawn_twice(parameters, expected):
    many = config(parameters, num_trials=60).search
    trials = planned_trials(many)
    assert len(trials) == len(expected) == total_trials(many)
    assert all(trial in trials for trial in expected)
    if "g" not in parameters:
        assert planned_trials(config(parameters, num_trials=2).search) == trials[:2]


def test_members_of_a_population_may_begin_alike():
    search = config({"training.learning_rate": {"choice": [0.1, 0.2]}}, num_trials=4, scheduler="pbt").search
    assert len(planned_trials(search)) == total_trials(search) == 4


def test_optuna_suggests_nothing_twice_and_ends_where_all_was_tried():
    search = config(SIX, num_trials=60, searcher="optuna").search
    assert total_trials(search) == 6
    assert total_trials(config(SIX | {"x": {"uniform": [0, 1]}}, searcher="optuna").search) == 20
    suggestions = OptunaSuggestions(search)
    number = suggestions.begin(ALL_SIX[0])
    found = [ALL_SIX[0]]
    while True:
        suggestions.tell(number, [float(found[-1] == ALL_SIX[0])])  # all speaks for what was tried first
        suggested = suggestions.suggest()
        if suggested is None:
            break
        number, values = suggested
        found.append(values)
    assert len(found) == 6
    assert all(values in found for values in ALL_SIX)


def test_optuna_finds_what_it_is_told_to_find():
    search = config(
        {
            "x": {"uniform": [0, 1]},
            "kind": {"choice": [{"name": "bad"}, {"name": "good"}]},
            "n": {"randint": [1, 9]},
        },
        num_trials=60,
        searcher="optuna",
    ).search
    suggestions = OptunaSuggestions(search)
    late = []
    for trial in range(60):
        number, values = suggestions.suggest()
        accuracy = (values["kind"]["name"] == "good") * 0.5 + 0.5 * math.exp(-20 * (values["x"] - 0.3) ** 2)
        suggestions.tell(number, [accuracy])
        if trial >= 40:
            late.append(values)
    assert np.mean([values["kind"]["name"] == "good" for values in late]) > 0.8
    assert abs(np.median([values["x"] for values in late]) - 0.3) < 0.1
    assert all(isinstance(values["n"], int) and 1 <= values["n"] <= 8 for values in late)


def test_optuna_goes_on_with_what_earlier_runs_found():
    search = config(
        {"x": {"uniform": [0, 1]}, "q": {"qloguniform": [1, 100, 5]}}, num_trials=60, searcher="optuna"
    ).search
    suggestions = OptunaSuggestions(search)
    for x in np.linspace(0, 1, 30):
        number = suggestions.begin({"x": float(x), "q": 10.0})
        suggestions.tell(number, None if x > 0.9 else [math.exp(-50 * (x - 0.7) ** 2)])
    found = [suggestions.suggest()[1] for _ in range(10)]
    assert abs(np.median([values["x"] for values in found]) - 0.7) < 0.15
    assert all(values["q"] % 5 == 0 or values["q"] == 1 for values in found)

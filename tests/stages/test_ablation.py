"""The standard ablation: which methods, and what it leaves."""

import csv
import io

import pytest
from tiny_road import TINY

from tmkd_ray.cli import main
from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import UserError
from tmkd_ray.report.ablation import ablation_csv, ablation_markdown
from tmkd_ray.results import RunResults
from tmkd_ray.stages.ablation import ablation_config

PARTS = ["full", "no_views", "edge_only", "high_frequency_only", "uniform_weights", "no_text", "no_contrastive"]


def test_every_part_is_left_out_alone():
    config = ablation_config(read_config(None, ["dataset=digits"]))
    assert list(config.methods) == [*PARTS, "plain", "alone"]
    assert config.seeds == (0, 1, 2)
    full = config.methods["full"]
    assert full == config.distiller
    changed = {
        name: {field for field, value in dict(method).items() if value != getattr(full, field)}
        for name, method in config.methods.items()
    }
    assert changed["no_views"] == changed["edge_only"] == changed["high_frequency_only"] == {"views"}
    assert config.methods["edge_only"].views == ("original", "edge")
    assert changed["uniform_weights"] == {"weighting"}
    assert changed["no_text"] == {"text_weight"}
    assert changed["no_contrastive"] == {"contrastive_weight"}
    assert changed["plain"] == {"teacher", "views", "text_weight", "contrastive_weight"}
    assert config.methods["alone"].teacher == "none"


def test_parts_that_are_out_already_are_no_rows():
    options = ["distiller.text_weight=0", "distiller.weighting=uniform", "views=[original, edge]"]
    config = ablation_config(read_config(None, ["dataset=digits", *options]), ["kd", "dkd"])
    parts = ("full", "no_views", "no_contrastive", "plain")
    assert list(config.methods) == [*(f"{name}-{part}" for name in ("kd", "dkd") for part in parts), "alone"]
    assert config.methods["dkd-full"].strategy.name == "dkd"


@pytest.mark.parametrize(
    ("overrides", "strategies", "message"),
    [
        (["distiller=kd"], None, "fused teacher of at least two views"),
        (["views=[original]"], None, "fused teacher of at least two views"),
        ([], ["kdd"], "kd"),
        ([], ["fitnet"], "online"),
    ],
)
def test_what_cannot_be_taken_apart_is_a_clear_error(overrides, strategies, message):
    with pytest.raises(UserError, match=message):
        ablation_config(read_config(None, ["dataset=digits", *overrides]), strategies)


def test_each_part_is_compared_with_the_whole_of_its_own_strategy(make_results, make_method):
    accuracies = {"kd-full": 0.9, "kd-plain": 0.8, "dkd-full": 0.6, "dkd-plain": 0.75, "alone": 0.5}
    methods = [make_method(name, [value, value + 0.01]) for name, value in accuracies.items()]
    results = make_results(methods=methods)
    rows = {row["part"]: row for row in csv.DictReader(io.StringIO(ablation_csv(results)))}
    assert rows["kd-full"]["difference"] == rows["dkd-full"]["difference"] == ""
    expected = {"kd-plain": -0.1, "dkd-plain": 0.15, "alone": -0.4}
    assert {name: float(rows[name]["difference"]) for name in expected} == pytest.approx(expected)
    assert "`alone` with that of the first" in ablation_markdown(results)
    assert "`alone` with that of the first" not in ablation_markdown(make_results(methods=methods[:2]))


@pytest.mark.ray
def test_an_ablation_leaves_a_table_a_csv_and_a_figure(tiny_copy, capsys):
    options = [*(item for item in TINY if not item.startswith("methods")), f"output={tiny_copy}"]
    options += ["training.epochs=1"]
    assert main(["ablate", *options]) == 0
    folder = tiny_copy / "tiny"
    results = RunResults.load(folder / "ablation.json")
    names = [method.name for method in results.methods]
    assert names == [*PARTS, "plain", "alone"]
    with open(folder / "ablation.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == names
    for row, method in zip(rows, results.methods, strict=True):
        accuracies = method.accuracies("test")
        assert [float(value) for value in row["accuracies"].split()] == accuracies
        assert float(row["mean"]) == pytest.approx(sum(accuracies) / 2)
    full, plain = (results.methods[names.index(name)].accuracies("test") for name in ("full", "plain"))
    difference = float(rows[names.index("plain")]["difference"])
    assert difference == pytest.approx(sum(plain) / 2 - sum(full) / 2)
    markdown = (folder / "ablation.md").read_text()
    assert all(f"| `{name}` |" in markdown for name in names)
    assert (folder / "ablation.svg").read_text().startswith("<?xml")
    capsys.readouterr()
    assert main(["ablate", *options]) == 0
    assert capsys.readouterr().err.count("done before, kept") == 2 + 2 * len(names)

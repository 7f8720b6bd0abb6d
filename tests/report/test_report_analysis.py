"""The sections made from an analysis file, one run and several, and `tmkd report`."""

import re

import numpy as np
import pytest

from tmkd_ray.analysis_record import analysis_path
from tmkd_ray.cli import main
from tmkd_ray.report import network_figures
from tmkd_ray.report.html import write_page
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.results import CostRecord

COST = CostRecord(flops=25_003_264, latency_seconds=0.0007169, device="cpu", threads=1)


def with_classes(results, accuracies=(0.9, 0.8, None)):
    """Per-class accuracies and costs, as newer runs have them."""
    methods = [
        method.model_copy(
            update={
                "cost": COST,
                "runs": [
                    run.model_copy(update={"per_class_accuracy": list(accuracies), "test_ece": 0.05})
                    for run in method.runs
                ],
            }
        )
        for method in results.methods
    ]
    teacher = results.teacher.model_copy(update={"per_class_accuracy": [1.0, 0.7, None], "cost": COST})
    return results.model_copy(update={"methods": methods, "teacher": teacher})


@pytest.fixture
def run_folder(make_results, make_analysis, tmp_path):
    """A run's folder as `tmkd run` leaves it."""

    def make(name, with_analysis=True):
        results = with_classes(make_results(name=name, created="2026-01-31T12:00:00+00:00"))
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        results.save(folder / "results.json")
        if with_analysis:
            make_analysis(results).save(analysis_path(str(folder / "results.json")))
        return folder

    return make


def sections(text):
    return re.findall(r'<section id="([^"]*)"', text)


def test_a_whole_run_from_its_folder(run_folder, capsys):
    folder = run_folder("one")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    text = (folder / "report.html").read_text()
    assert sections(text) == [
        *("results", "views", "weights", "training", "classes", "confusion", "calibration", "correlation"),
        *("features", "grad-cam", "teachers", "knowledge", "data", "times", "notes", "configuration"),
        "environment",
    ]
    assert ">25 M<" in text  # FLOPs
    assert ">0.717<" in text  # milliseconds
    assert "ECE " in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
    assert targets <= set(ids)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r'(href|src)="(?!#|data:)', text)


def test_differences_to_the_teacher_are_in_points(run_folder):
    folder = run_folder("one")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    table = text[text.index("<summary>Every class") :]
    row = re.search(r'<tr><th scope="row" class="word">class 0</th>(.*?)</tr>', table)
    assert row is not None
    assert re.findall(r">([^<]*)</td>", row[1]) == ["100.00", *["90.00"] * 3, *["−10.00"] * 3]
    row = re.search(r'<tr><th scope="row" class="word">class 2</th>(.*?)</tr>', table)
    assert row is not None
    assert set(re.findall(r">([^<]*)</td>", row[1])) == {"–"}


def test_the_most_confused_pairs_come_first(run_folder):
    folder = run_folder("one")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    table = text[text.index("Most confused") :]
    rows = re.findall(
        r'<tr><th scope="row" class="word">(.*?)</th><td class="word">(.*?)</td>(.*?)</tr>', table
    )
    assert [row[:2] for row in rows[:6]] == [
        *(("class 0", "class 1"), ("class 1", "class 2"), ("class 2", "class 0")),
        *(("class 0", "class 2"), ("class 1", "class 0"), ("class 2", "class 1")),
    ]
    assert re.findall(r">([^<]*)</td>", rows[0][2]) == ["7.5"] * 4
    assert re.findall(r">([^<]*)</td>", rows[3][2]) == ["2.5"] * 4


def test_several_runs_side_by_side(run_folder, tmp_path):
    folders = [run_folder("one"), run_folder("two", with_analysis=False)]
    out = tmp_path / "both.html"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    text = out.read_text()
    found = sections(text)
    assert found[0] == "comparison"
    assert {"run1-confusion", "run1-grad-cam", "run2-results", "run2-analysis"} <= set(found)
    assert "run2-confusion" not in found
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert "one: Method tmkd" in text
    assert "two: Method tmkd" in text
    table = text[text.index('id="comparison"') :]
    assert table.index(">25 M<") < table.index("<svg")


def test_what_differs_between_configurations_is_listed(make_results, tmp_path):
    one = make_results(config={"seed": 0, "a": {"b": 1, "same": True}})
    two = make_results(config={"seed": 0, "a": {"b": 2, "same": True}, "new": "x"})
    write_page(tmp_path / "x.html", [RunPage(one), RunPage(two)])
    text = (tmp_path / "x.html").read_text()
    part = text[text.index("Where the configurations differ") : text.index("<article")]
    rows = re.findall(
        r'<tr><th scope="row" class="word">(.*?)</th><td class="word">(.*?)</td>.*?>(.*?)</td>', part
    )
    assert rows == [("a.b", "1", "2"), ("new", "–", "x")]


def test_a_run_without_an_analysis_says_what_makes_it(run_folder, capsys):
    folder = run_folder("old", with_analysis=False)
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    command = f"tmkd run --config {folder}/config.yaml output={folder.parent}"
    assert f"<code>{command}</code>" in text
    assert f"there is no {folder}/results-analysis.npz" in text
    assert command in capsys.readouterr().out


def test_the_analysis_of_another_run_is_not_shown(run_folder, make_results):
    folder = run_folder("one")
    make_results(created="2026-02-01T00:00:00Z").save(folder / "results.json")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert "is of another run than" in text
    assert "confusion" not in sections(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no run at "),
        ({}, "is no finished run: there is no results.json in it"),
        ({"results.json": b"{"}, "are not valid JSON"),
        ({"results-analysis.npz": b"PK"}, "is no analysis file"),
    ],
)
def test_a_wrong_folder_is_an_error_for_people(run_folder, tmp_path, capsys, content, message):
    folder = tmp_path / "wrong"
    if content is not None:
        folder.mkdir()
        if "results-analysis.npz" in content:
            folder = run_folder("damaged")
        for name, data in content.items():
            (folder / name).write_bytes(data)
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_folder_of_runs_names_them(run_folder, capsys):
    folder = run_folder("one")
    assert main(["report", str(folder.parent)]) == 2
    assert f"it holds the runs one: give one of these, as {folder}" in capsys.readouterr().err


def test_class_names_of_users_are_escaped(make_results, make_analysis, tmp_path):
    results = with_classes(make_results())
    names = ["<script>alert(1)</script>", '"x" onload=y', "&amp;"]
    results = results.model_copy(update={"dataset": results.dataset.model_copy(update={"class_names": names})})
    write_page(tmp_path / "x.html", [RunPage(results, make_analysis(results))])
    text = (tmp_path / "x.html").read_text()
    assert "<script" not in text
    assert ' onload=y"' not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_a_hundred_classes_make_a_page_of_sane_size(make_results, make_analysis, tmp_path):
    results = make_results(num_classes=100)
    results = with_classes(results, np.linspace(0, 1, 100).tolist())
    teacher = results.teacher.model_copy(update={"per_class_accuracy": [0.5] * 100})
    results = results.model_copy(update={"teacher": teacher})
    write_page(tmp_path / "x.html", [RunPage(results, make_analysis(results))])
    assert (tmp_path / "x.html").stat().st_size < 10e6
    text = (tmp_path / "x.html").read_text()
    assert "Drawn are 20 of the 100 classes" in text
    assert text.count("<tr", text.index("<summary>Every class"), text.index('id="confusion"')) == 101


def test_an_explanation_is_brightest_where_the_evidence_is():
    image = np.full((1, 3, 3), 200, dtype=np.uint8)
    overlay = network_figures.heat_overlay(image, np.array([[0, 128, 255]], dtype=np.uint8))
    np.testing.assert_array_equal(overlay[0, 0], [170, 170, 170])  # nothing but the image, darker
    assert overlay[0, 2, 0] > 200  # the top of the map is light, and yellow
    assert overlay[0, 2, 2] < overlay[0, 2, 0]
    assert len({tuple(pixel) for pixel in overlay[0].tolist()}) == 3


def test_twenty_classes_look_different():
    styles = {tuple(network_figures.class_style(index).values()) for index in range(20)}
    assert len(styles) == 20


def test_names_of_classes_that_lie_together_stay_apart():
    places = np.random.default_rng(0).normal(size=(20, 2))
    drawing = network_figures.projection(
        "p", np.concatenate([places, places]), np.repeat([0, 1], 20), [0, 1], ["ant", "bee"]
    )
    ant, bee = (float(re.search(rf'y="([\d.]+)"[^>]*>{name}', drawing)[1]) for name in ("ant", "bee"))
    assert abs(ant - bee) >= 12, "a line of text"

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tmkd_ray.analysis_record import Analysis, ViewGallery
from tmkd_ray.report.elements import Markup, element
from tmkd_ray.report.html import write_report
from tmkd_ray.results import DatasetRecord, RunResults, SetAsideImage

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Reads a page and fails on a tag that is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


def shown_with(gallery: ViewGallery | None) -> Analysis | None:
    """An analysis of which only the gallery is there."""
    return None if gallery is None else Analysis(created="", gallery=gallery, num_images=1)


@pytest.fixture
def page(tmp_path):
    def write(results: RunResults, gallery: ViewGallery | None = None) -> Page:
        write_report(tmp_path / "report.html", results, shown_with(gallery))
        return Page((tmp_path / "report.html").read_text())

    return write


def sections(page: Page) -> list[str]:
    return [value for tag, name, value in page.attributes if tag == "section" and name == "id"]


ALL_SECTIONS = [
    "results",
    "views",
    "weights",
    "training",
    "teachers",
    "knowledge",
    "data",
    "times",
    "notes",
    "configuration",
    "environment",
]


def test_a_whole_run_has_every_section(make_results, gallery, page):
    shown = page(make_results(), gallery)
    assert sections(shown) == ALL_SECTIONS
    assert shown.values("href")[1 : len(ALL_SECTIONS) + 1] == [f"#{name}" for name in ALL_SECTIONS]
    assert "Method tmkd has the highest test accuracy" in shown.text
    assert "92.00 ± 2.00" in shown.text
    # The summary and the table come before any picture.
    assert shown.tags.index("table") < shown.tags.index("svg")
    assert shown.tags.index("table") < shown.tags.index("img")


def test_nothing_is_loaded_from_elsewhere(make_results, gallery, page, tmp_path):
    shown = page(make_results(), gallery)
    assert not {"script", "iframe", "object"} & set(shown.tags)
    sources = shown.values("src", "srcset", "xlink:href", "href", "action", "data")
    assert len(sources) > len(ALL_SECTIONS)
    assert all(source.startswith(("#", "data:image/png;base64,", "data:,")) for source in sources)
    text = (tmp_path / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_every_reference_has_its_target(make_results, gallery, page, tmp_path):
    shown = page(make_results(), gallery)
    ids = shown.values("id")
    assert len(set(ids)) == len(ids)
    text = (tmp_path / "report.html").read_text()
    references = set(re.findall(r"url\(#([^)]*)\)", text))
    references |= {href[1:] for href in shown.values("href") if href.startswith("#")}
    assert references <= set(ids)


HOSTILE = "<script>alert('&amp;')</script> \"x\" onload=$\\frac$"


def test_what_comes_from_users_is_escaped(make_results, make_method, page):
    results = make_results()
    assert results.teacher is not None
    assert results.clip is not None
    method = make_method("alone", [0.9], terms=(HOSTILE,)).model_copy(update={"label": HOSTILE})
    hostile = make_results(
        name=HOSTILE,
        dataset=DatasetRecord(
            name=HOSTILE,
            class_names=[HOSTILE, "b", "c"],
            num_train=1,
            num_validation=1,
            num_test=1,
            image_size=8,
            set_aside=[SetAsideImage(id=HOSTILE, reason=HOSTILE)],
        ),
        methods=[method],
        teacher=results.teacher.model_copy(update={"model": HOSTILE, "source": HOSTILE}),
        clip=results.clip.model_copy(update={"source": HOSTILE}),
        stage_seconds={HOSTILE: 1.0},
        config={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        hardware={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )
    gallery = ViewGallery(images=np.zeros((1, 1, 4, 4, 3), np.uint8), view_names=(HOSTILE,), labels=(HOSTILE,))
    shown = page(hostile, gallery)
    assert "script" not in shown.tags
    assert "onload" not in [name for _, name, _ in shown.attributes]
    # It is shown as it is, as text: heading, class names, set aside twice, stage, note, gallery …
    assert shown.text.count(HOSTILE) >= 12


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"teacher": None}, []),
        ({"clip": None, "semantic_weights": None}, ["weights"]),
        ({"teacher": None, "clip": None, "semantic_weights": None}, ["teachers", "weights"]),
        ({"knowledge": None}, ["knowledge"]),
        ({"semantic_weights": None}, ["weights"]),
        ({"methods": []}, ["training"]),
        ({"stage_seconds": {}}, ["times"]),
        ({"config": {}}, ["configuration"]),
        ({"notes": []}, ["notes"]),
        ({"versions": {}, "hardware": {}}, ["environment"]),
        ({"versions": {}}, []),
    ],
)
def test_what_a_run_does_not_have_is_left_out(make_results, gallery, page, changes, missing):
    shown = page(make_results(**changes), gallery)
    assert sections(shown) == [name for name in ALL_SECTIONS if name not in missing]
    assert "None" not in shown.text
    assert "nan" not in shown.text.lower().split()


def test_the_barest_run(make_results, make_method, page):
    method = make_method("alone", [None])
    run = method.runs[0].model_copy(update={"history": []})
    bare = RunResults(
        name="bare",
        created="2026-01-31T12:00:00+00:00",
        dataset=DatasetRecord(
            name="d", class_names=["a"], num_train=1, num_validation=1, num_test=0, image_size=8
        ),
        methods=[method.model_copy(update={"runs": [run]})],
    )
    shown = page(bare)
    assert sections(shown) == ["results", "data"]
    assert "Images set aside" not in shown.text
    assert "None" not in shown.text


def test_teachers_without_history_or_view_accuracies(make_results, page):
    results = make_results()
    assert results.teacher is not None
    assert results.clip is not None
    teacher = results.teacher.model_copy(
        update={"history": [], "view_validation_accuracy": {}, "fused_validation_accuracy": {}, "seconds": None}
    )
    clip = results.clip.model_copy(update={"history": [], "zero_shot_validation_accuracy": {}, "seconds": None})
    shown = page(results.model_copy(update={"teacher": teacher, "clip": clip}))
    assert "teacher.safetensors" in shown.text
    assert "while fitting" not in shown.text
    assert "Fitting time" not in shown.text


def test_the_first_set_aside_images_and_their_count(make_results, page):
    text = page(make_results()).text
    assert "25 images could not be used; the first 20:" in text
    assert "image-19 truncated at 19" in text
    assert "image-20" not in text


def test_a_hundred_classes_are_cut_to_the_extremes(make_results, page):
    results = make_results(num_classes=100)
    assert results.semantic_weights is not None
    rows = [[0.4, 0.3, 0.3]] * 99 + [[0.0, 0.0, 1.0]]
    text = page(results.model_copy(update={"semantic_weights": rows})).text
    assert "Only 20 of the 100 classes are shown" in text
    assert "mean of 100 class 99 " in text


def test_a_thousand_classes_and_long_names(make_results, page):
    results = make_results(num_classes=1000)
    names = [f"class {label} " + "very " * 30 + "long" for label in range(1000)]
    dataset = results.dataset.model_copy(update={"class_names": names})
    shown = page(results.model_copy(update={"dataset": dataset}))
    assert "Only 20 of the 1000 classes" in shown.text
    heights = [float(value) for tag, name, value in shown.attributes if tag == "svg" and name == "height"]
    assert max(heights) < 600


def test_a_diverged_run_is_named(make_results, make_method, page):
    method = make_method("alone", [0.1])
    run = method.runs[0]
    history = [record.model_copy(update={"loss": None if record.epoch > 4 else 1.0}) for record in run.history]
    method = method.model_copy(update={"runs": [run.model_copy(update={"history": history})]})
    assert "not finite: Method alone, seed 0, from epoch 5." in page(make_results(methods=[method])).text
    assert "not finite" not in page(make_results()).text


def test_the_gallery_shows_the_pixels(make_results, gallery, page):
    shown = page(make_results(), gallery)
    sources = shown.values("src")
    assert len(sources) == 6
    first = Image.open(io.BytesIO(base64.b64decode(sources[1].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(first), gallery.images[0, 1])
    assert shown.values("alt")[1] == "class 0, edge"
    assert "0.50 original" in shown.text


def test_large_images_are_shrunk(make_results, page):
    gallery = ViewGallery(
        images=np.zeros((1, 1, 300, 400, 3), np.uint8), view_names=("original",), labels=("a",)
    )
    source = page(make_results(), gallery).values("src")[0]
    assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (192, 144)


def test_views_without_a_name_are_numbered(make_results, page):
    text = page(make_results(knowledge=None)).text
    assert "view 1 (mean" in text
    assert "view 3 (mean" in text


def test_the_same_results_give_the_same_bytes(make_results, gallery, tmp_path):
    results = make_results()
    results.save(tmp_path / "results.json")
    write_report(tmp_path / "a.html", results, shown_with(gallery))
    write_report(tmp_path / "b.html", RunResults.load(tmp_path / "results.json"), shown_with(gallery))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "results.json"]


def test_figures_do_not_touch_pyplot():
    script = "import sys, tmkd_ray.report.html; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_element_escapes_all_but_markup():
    assert element("p", "<b>", Markup("<i>"), class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;<i></p>'
    assert element("img", src="a&b") == '<img src="a&amp;b">'
    # A piece cut out of markup is plain text again.
    assert element("p", Markup("<i>")[:2]) == "<p>&lt;i</p>"

"""`tmkd views`: what is drawn, in which order, and what is refused."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tmkd_ray.cli import main
from tmkd_ray.commands.views import gallery_rows, read_grid
from tmkd_ray.errors import UserError
from tmkd_ray.report.panels import Panel, PanelRow, panels_png
from tmkd_ray.views import build_view
from tmkd_ray.views.edge import EdgeConfig
from tmkd_ray.views.original import OriginalConfig


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, images):
    (tmp_path / "in" / "below").mkdir(parents=True)
    Image.fromarray(images[0]).save(tmp_path / "in" / "a.png")
    Image.fromarray(images[1]).save(tmp_path / "in" / "below" / "b.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def titles(rows) -> list[tuple[str, list[str]]]:
    return [(row.label, [panel.title for panel in row.panels]) for row in rows]


def test_without_a_grid_each_image_has_its_views_in_a_row(images):
    configs = {"original": OriginalConfig(), "edge": EdgeConfig(strength=0.4)}
    rows = gallery_rows(images, ["a", "b"], configs, [])
    assert titles(rows) == [
        ("a", ["original", "edge\nstrength=0.4"]),
        ("b", ["original", "edge\nstrength=0.4"]),
    ]
    np.testing.assert_array_equal(rows[1].panels[0].image, images[1])
    np.testing.assert_array_equal(rows[1].panels[1].image, build_view("edge", {"strength": 0.4})(images)[1])


def test_a_grid_sweeps_the_last_option_along_the_row(images):
    sweeps = read_grid(
        ["edge.operator=sobel,laplacian", "high_frequency.cutoff=0.25", "edge.strength=0.1, 0.5,1"]
    )
    rows = gallery_rows(images[:1], ["a"], {"edge": EdgeConfig(mode="map")}, sweeps)
    assert titles(rows) == [
        ("a", ["original", *(f"edge\noperator=sobel\nstrength={s}" for s in (0.1, 0.5, 1))]),
        ("a", ["original", *(f"edge\noperator=laplacian\nstrength={s}" for s in (0.1, 0.5, 1))]),
        ("a", ["original", "high_frequency\ncutoff=0.25"]),
    ]
    expected = build_view("edge", {"mode": "map", "operator": "laplacian", "strength": 0.5})(images)[0]
    np.testing.assert_array_equal(rows[1].panels[2].image, expected)
    expected = build_view("high_frequency", {"cutoff": 0.25})(images)[0]
    np.testing.assert_array_equal(rows[2].panels[1].image, expected)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["edge.strengh=1"], "edge has no option 'strengh' that changes pixels; did you mean 'strength'?"),
        (["edge.prompts=a"], "edge has no option 'prompts' that changes pixels"),
        (["original.x=1"], "original has no option 'x' that changes pixels; its options: none"),
        (["egde.strength=1"], "unknown view 'egde'. Did you mean 'edge'?"),
        (["edge.strength"], "expected VIEW.OPTION=VALUE,VALUE"),
        (["edge.strength=0.1,,1"], "expected VIEW.OPTION=VALUE,VALUE"),
        (["strength=1"], "expected VIEW.OPTION=VALUE,VALUE"),
        (["edge.strength=1", "edge.strength=0"], "edge.strength is swept twice"),
        (["edge.strength=1,7"], "edge with strength=7: strength: must be at most 1 (given: 7)"),
        (["edge.operator=sobel,prewitt"], "edge with operator=prewitt: operator: expected"),
        (["edge.kernel_size=5", "edge.operator=canny"], "kernel_size must be 3 for canny"),
    ],
)
def test_grids_that_are_refused(folder, tmp_path, capsys, grid, message):
    out = tmp_path / "out.png"
    assert main(["views", str(folder), "--out", str(out), *(f"--grid={entry}" for entry in grid)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_too_many_panels(images):
    sweep = read_grid([f"edge.strength={','.join(f'0.{i:04}' for i in range(1001))}"])
    with pytest.raises(UserError, match="2,004 panels; at most 2,000"):
        gallery_rows(images, ["a", "b"], {}, sweep)


def test_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "out" / "gallery.png"
    assert main(["views", str(folder), "--out", str(out)]) == 0
    assert "2 images of 16 pixels, 6 panels" in capsys.readouterr().out, "their own size"
    assert main(["views", str(folder), "--out", str(out), "--size", "32"]) == 0
    assert "2 images of 32 pixels, 6 panels" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_a_configuration_gives_images_of_several_classes_and_its_views(tmp_path, capsys):
    (tmp_path / "digits.yaml").write_text(
        "dataset: digits\nviews: {original: {}, edge: {strength: 1.0}}\nstudent: {model: resnet8}\n"
    )
    out = tmp_path / "gallery.png"
    assert main(["views", str(tmp_path / "digits.yaml"), "--out", str(out), "--num", "3"]) == 0
    assert "3 images of 32 pixels, 6 panels" in capsys.readouterr().out
    config = ["views", str(tmp_path / "digits.yaml"), "--out", str(out)]
    assert main([*config, "--num", "1", "views.edge.strength=0.2", "dataset.image_size=16"]) == 0
    assert "1 images of 16 pixels, 2 panels" in capsys.readouterr().out
    assert main([*config, "x.png"]) == 2
    assert "one configuration and overrides" in capsys.readouterr().err


def test_a_folder_of_parquet_shards_gives_images_of_several_classes(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (14, 12)).save(buffer, "PNG")
    feature = {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    table = pa.table({"image": [buffer.getvalue()] * 9, "label": [i % 3 for i in range(9)]})
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "data" / f"{split}-0.parquet")
    drawn = []
    monkeypatch.setattr("tmkd_ray.report.panels.panels_png", lambda rows: drawn.extend(rows) or b"")
    assert main(["views", str(tmp_path), "--out", str(tmp_path / "gallery.png"), "--num", "4"]) == 0
    assert [row.label for row in drawn] == ["ant", "bee", "cat", "ant"]
    assert drawn[0].panels[0].image.shape == (12, 12, 3), "the size of the data's own images"


def test_a_file_below_the_folder_given_is_named_with_its_own_folder(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("tmkd_ray.report.panels.panels_png", lambda rows: drawn.extend(rows) or b"")
    assert main(["views", str(folder), str(folder / "a.png"), "--out", str(tmp_path / "gallery.png")]) == 0
    assert [row.label for row in drawn] == ["a.png", "below/b.png", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "there is no file or folder nowhere.png"),
        (["{folder}/notes.txt"], "none of the 1 files can be decoded"),
        (["{folder}", "--num", "0"], "--num is at least 1"),
        (["{folder}", "--size", "4"], "--size is at least 8 pixels"),
        (["{folder}", "--out", "gallery.jpg"], "the picture is a PNG"),
        (["nowhere.yaml"], "there is no file nowhere.yaml"),
    ],
)
def test_wrong_arguments(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["views", *(argument.format(folder=folder) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_the_pictures_place_and_order():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    rows = [
        PanelRow("one", [Panel("x", np.full((8, 8, 3), colour, np.uint8)) for colour in colours]),
        PanelRow("two", [Panel("x", np.full((8, 8, 3), colour, np.uint8)) for colour in colours[::-1]]),
    ]
    picture = np.asarray(Image.open(io.BytesIO(panels_png(rows))).convert("RGB")).astype(int)
    height, width, _ = picture.shape
    middle = [picture[int(height * y), int(width * x)].tolist() for y in (0.3, 0.8) for x in (0.2, 0.5, 0.85)]
    assert middle == [list(colour) for colour in (*colours, *colours[::-1])]
    assert panels_png(rows) == panels_png(rows), "the same images give the same bytes"

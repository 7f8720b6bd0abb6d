"""The command line: exit codes, messages, and that mistakes are told before Ray is started."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import transformers
from PIL import Image

from tmkd_ray import __version__
from tmkd_ray.cli import main
from tmkd_ray.commands.run import demo_config
from tmkd_ray.config_reading import read_config
from tmkd_ray.models import build_model
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.types import TaskSpec

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROAD = ("run", "demo", "fit-teacher", "fit-clip", "knowledge", "distill", "evaluate")
"""Every command that does something with the data."""


class RayStartedError(Exception):
    """Raised in place of starting Ray."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch, tmp_path):
    """Fail as soon as anything starts Ray or joins one; and write into a folder of the test's own."""

    def start(*args, **kwargs):
        raise RayStartedError

    was_there = ray.is_initialized()  # tests of the stages may have left theirs running
    with monkeypatch.context() as patches:
        patches.setattr(ray, "init", start)
        patches.setattr(ray, "is_initialized", lambda: False)
        patches.chdir(tmp_path)
        yield
    assert ray.is_initialized() == was_there
    assert not (tmp_path / "runs").exists(), "a run was begun"


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused and return the one message it leaves on stderr."""

    def refused(*arguments):
        assert main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        return err.removeprefix("error: ").rstrip("\n")

    return refused


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Six 8×8 images in each of three class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Weights, right and wrong, for `teacher.visual.model=resnet8` on the digits."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def state(model, num_classes):
        names = tuple(f"class {label}" for label in range(num_classes))
        return build_model(model, TaskSpec(names, 32)).state_dict()

    torch.save(state("resnet8", 10), folder / "right.pth")
    torch.save(state("resnet8", 7), folder / "seven_classes.pth")
    torch.save(state("resnet14", 10), folder / "another_model.pth")
    torch.save({"epoch": 3, "accuracy": 0.5}, folder / "no_weights.pth")
    (folder / "truncated.pth").write_bytes((folder / "right.pth").read_bytes()[:1000])
    (folder / "text.pth").write_text("these are no weights")
    return folder


# Without a configuration


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"tmkd-ray {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["config"], "the following arguments are required: ACTION"),
        (["trian"], "invalid choice: 'trian'"),
        (["run", "--confg-file", "x"], "unrecognized arguments: --confg-file"),
        (["run", "dataset=digits", "--quick", "name=x"], "unrecognized arguments: --quick"),
        (["run", "--config"], "argument --config: expected one argument"),
        (["evaluate", "--split", "train"], "argument --split: invalid choice: 'train'"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: tmkd")
    assert message in err


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in (*ROAD, "config"))])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "usage: tmkd" in capsys.readouterr().out


# tmkd config show


def show(capsys, tmp_path, *arguments):
    assert main(["config", "show", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (tmp_path / "shown.yaml").write_text(out, encoding="utf-8")
    return read_config(tmp_path / "shown.yaml")


def test_show_without_a_file(capsys, tmp_path):
    shown = show(capsys, tmp_path, "dataset=digits", "training.epochs=3", "views.edge.strength=0.3")
    assert shown == read_config(None, ["dataset=digits", "training.epochs=3", "views.edge.strength=0.3"])
    assert shown.training.epochs == 3


def test_show_with_a_file_and_overrides(capsys, tmp_path):
    assert show(capsys, tmp_path, "--config", demo_config()) == read_config(demo_config())
    overrides = ["seeds=[4]", "teacher.text=null", "methods={alone: alone}"]
    shown = show(capsys, tmp_path, "--config", demo_config(), *overrides)
    assert shown == read_config(demo_config(), overrides)
    assert shown.teacher.text is None


def test_overrides_may_stand_on_both_sides_of_an_option_and_the_last_wins(capsys, tmp_path):
    arguments = ["name=a", "training.epochs=3", "--config", demo_config(), "training.epochs=4", "seeds=[7]"]
    shown = show(capsys, tmp_path, *arguments)
    assert (shown.name, shown.training.epochs, shown.seeds) == ("a", 4, (7,))


def test_show_looks_at_no_file_but_the_configuration(capsys, tmp_path):
    overrides = [
        "dataset={name: parquet, path: /nowhere, class_names: /nowhere.txt}",
        "teacher.visual.checkpoint=/nowhere.pth",
        "teacher.text.model=/nowhere",
    ]
    assert show(capsys, tmp_path, *overrides).teacher.visual.checkpoint == "/nowhere.pth"


@pytest.mark.parametrize("command", [*([command] for command in ROAD), ["config", "show"]], ids=" ".join)
def test_every_command_tells_all_mistakes_of_the_configuration(refused, command):
    text = refused(
        *command, "dataset=digits", "trainng.epochs=3", "training.epochs=true", "views.edge.strenght=1"
    )
    assert text.splitlines()[1:] == [
        "  views.edge.strenght: unknown key; did you mean 'strength'?",
        "  training.epochs: expected a number (given: true)",
        "  trainng: unknown key; did you mean 'training'?",
    ]


def test_configurations_that_cannot_be_read(refused, tmp_path):
    assert refused("run", "--config", "nowhere.yaml") == "--config: there is no file nowhere.yaml"
    assert refused("run", "--config", str(tmp_path)) == f"--config: cannot read {tmp_path}: Is a directory"
    (tmp_path / "x.yaml").write_text("dataset: [digits")
    assert refused("config", "show", "--config", "x.yaml").startswith(
        "x.yaml is not valid YAML: line 1, column 17: "
    )
    assert refused("run", "experiment.yaml").startswith(
        "override 'experiment.yaml': expected dotted.path=value"
    )
    assert "a file goes after --config" in refused("run", "experiment.yaml")


def test_a_real_process_exits_with_2_and_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tmkd_ray", "fit-teacher", "dataset=digitz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: 1 error in the configuration from the command line (no --config is given):\n"
        "  dataset: unknown dataset 'digitz'. Did you mean 'digits'? "
        "Choices: cifar10, cifar100, digits, image_folder, parquet\n"
    )


def test_a_pipeline_is_the_same_command(tmp_path):
    script = Path(__file__).parent.parent / "pipelines" / "distill.py"
    done = subprocess.run(
        [sys.executable, str(script), "dataset=digits", "training.epochs=0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith("  training.epochs: must be at least 1 (given: 0)\n")


# Data


@pytest.mark.parametrize("command", ROAD)
@pytest.mark.parametrize("name", ["parquet", "image_folder"])
def test_a_dataset_that_is_not_there(refused, command, name):
    assert refused(command, f"dataset={{name: {name}, path: /nowhere/data}}").endswith(
        "dataset.path: no folder /nowhere/data"
    )


def test_a_folder_without_data(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    text = refused("run", f"dataset={{name: parquet, path: {tmp_path}/empty}}")
    assert text.startswith("dataset.path: no train*.parquet")
    text = refused("run", f"dataset={{name: image_folder, path: {tmp_path}/empty}}")
    assert "at least two are needed" in text


def test_fewer_than_two_classes(refused, image_folder, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "ant").symlink_to(image_folder / "ant")
    text = refused("run", f"dataset={{name: image_folder, path: {tmp_path}/one}}")
    assert text == "dataset image_folder: 1 class names (ant); at least two are needed"


@pytest.mark.parametrize("command", ROAD)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (DIGITS[:7], "labels run 0..9 but 7 class names are given"),
        ((*DIGITS, "ten"), "labels run 0..9 but 11 class names are given"),
        (("one",), "1 class names (one); at least two are needed"),
        ((), "at least two are needed"),
        ((*DIGITS[:9], "one"), "class names given more than once: one"),
    ],
    ids=["too few", "too many", "one", "none", "one twice"],
)
def test_class_names_that_do_not_fit_the_labels(refused, tmp_path, command, names, message):
    (tmp_path / "names.txt").write_text("\n".join(names))
    text = refused(command, "dataset=digits", "dataset.class_names=names.txt")
    assert message in text
    assert "names.txt" in text or "dataset.class_names" in text


def test_a_class_name_file_that_is_not_there(refused):
    text = refused("run", "dataset=digits", "dataset.class_names=nowhere.txt")
    assert text.startswith("dataset.class_names: cannot read nowhere.txt")


def test_of_two_class_name_files_the_last_one_is_read(refused, tmp_path):
    (tmp_path / "right.txt").write_text("\n".join(DIGITS))
    (tmp_path / "wrong.txt").write_text("\n".join(DIGITS[:4]))
    last_is_right = ["dataset.class_names=wrong.txt", "dataset.class_names=right.txt"]
    stop = "teacher.visual.checkpoint=/nowhere.pth"
    assert "/nowhere.pth" in refused("run", "dataset=digits", *last_is_right, stop)
    assert "4 class names are given" in refused("run", "dataset=digits", *reversed(last_is_right), stop)


def test_class_names_for_folders(refused, image_folder, tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\ndog")
    text = refused("run", f"dataset={{name: image_folder, path: {image_folder}, class_names: names.txt}}")
    assert "Folders without a name: cat. Names without a folder: dog" in text


def test_a_test_split_with_unknown_labels_is_refused_before_anything_is_trained(refused, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "names.txt").write_text("ant\nbee")
    for split, labels in (("train", [0, 1] * 8), ("test", [0, 1, 2])):
        table = pa.table({"image": [b"x"] * len(labels), "label": labels})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    text = refused("run", f"dataset={{name: parquet, path: {tmp_path}, class_names: names.txt}}")
    assert text.startswith("dataset parquet, test split: labels run 0..2 but 2 class names are given")


def test_more_workers_than_images(refused):
    text = refused("run", "dataset={name: digits, limit: 20}", "training={num_workers: 64, batch_size: 64}")
    assert text.startswith("training.num_workers is 64, but there are ")


def test_no_image_left_for_validation(refused):
    text = refused("run", "dataset={name: digits, limit: 10}")
    assert text == "dataset digits: no class has two images, so none is left for validation"


# The visual teacher


NEEDS_TEACHER = ("run", "demo", "knowledge", "evaluate")
RESNET8 = ("dataset=digits", "teacher.visual.model=resnet8")


@pytest.mark.parametrize("command", NEEDS_TEACHER)
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nowhere.pth", "is not a file; give the path of a .pth"),
        ("", "is not a file; give the path of a .pth"),
        ("seven_classes.pth", "the checkpoint has 7 classes, the task has 10"),
        ("another_model.pth", "does not fit the model (CifarResNet): is it another model's?"),
        ("no_weights.pth", "holds no state dict"),
        ("truncated.pth", "cannot read checkpoint"),
        ("text.pth", "cannot read checkpoint"),
    ],
)
def test_a_teacher_checkpoint_that_does_not_fit(refused, checkpoints, command, file, message):
    path = str(checkpoints / file).rstrip("/")
    text = refused(command, *RESNET8, f"teacher.visual.checkpoint={path}")
    assert text.startswith("teacher.visual: ")
    assert path in text
    assert message in text


def test_names_that_do_not_fit_are_listed_a_few_of_them(refused, checkpoints):
    text = refused("run", *RESNET8, f"teacher.visual.checkpoint={checkpoints}/another_model.pth")
    assert "unknown to the model (" in text
    assert "layer1.1.conv1.weight" in text
    assert len(text) < 2000


def test_a_checkpoint_leaves_nothing_to_fit(refused, checkpoints):
    text = refused("fit-teacher", *RESNET8, f"teacher.visual.checkpoint={checkpoints}/right.pth")
    assert text.endswith("right.pth: nothing to fit; set it to null")


@pytest.mark.parametrize("command", [*NEEDS_TEACHER, "fit-teacher"])
def test_a_teacher_that_cannot_be_one(refused, command):
    text = refused(
        command, "dataset={name: digits, image_size: 64}", "teacher.visual.model=torchvision/squeezenet1_0"
    )
    assert text == (
        "teacher.visual: SqueezeNet has no linear classifier, so it cannot be a visual teacher; "
        "choose another one"
    )


def test_models_that_cannot_take_the_images(refused):
    small = "dataset={name: digits, image_size: 8}"
    for command in ("run", "fit-teacher"):
        text = refused(command, small, "teacher.visual.model=torchvision/alexnet")
        assert text.startswith("teacher.visual: torchvision/alexnet cannot take images of 8×8 pixels")
    text = refused("run", small, "teacher.visual.model=resnet8", "student.model=torchvision/alexnet")
    assert text.startswith("student.model: torchvision/alexnet cannot take images of 8×8 pixels")


# The text teacher


@pytest.mark.parametrize("command", [*NEEDS_TEACHER, "distill"])
def test_a_clip_folder_that_is_not_there(refused, command):
    for name in ("/nowhere/clip", "./clip", "~/nowhere"):
        assert refused(command, *RESNET8, f"teacher.text.model={name}") == (
            f"teacher.text.model: there is no folder {name}, and it is no hub name (OWNER/NAME) either"
        )


@pytest.mark.parametrize("command", [*NEEDS_TEACHER, "distill"])
def test_a_clip_folder_that_holds_no_clip(refused, tmp_path, command):
    (tmp_path / "empty").mkdir()
    text = refused(command, *RESNET8, f"teacher.text.model={tmp_path}/empty")
    assert text.startswith(f"teacher.text.model: cannot load a CLIP from the folder '{tmp_path}/empty'")


def test_a_model_that_is_no_clip(refused, tmp_path, capsys):
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    capsys.readouterr()  # its progress bar
    text = refused("knowledge", *RESNET8, f"teacher.text.model={tmp_path}/bert")
    assert text.startswith("teacher.text.model: ")
    assert f"{tmp_path}/bert" in text


def test_a_clip_that_is_named_leaves_nothing_to_fit(refused):
    for override in ("teacher.text.model=somebody/clip", "teacher.text=null"):
        text = refused("fit-clip", *RESNET8, "distiller=kd", override)
        assert text == "teacher.text names a model or is null: nothing to fit; set teacher.text.model to null"


# Students and the store


def test_distill_without_a_store(refused):
    text = refused("distill", *RESNET8)
    assert "knowledge" in text
    assert "tmkd knowledge" in text


def test_evaluate_without_anything_to_measure(refused):
    assert refused("evaluate", *RESNET8, "distiller=kd").startswith("nothing to evaluate yet: ")


def test_evaluate_of_a_checkpoint_passes_the_checks(checkpoints):
    given = [f"teacher.visual.checkpoint={checkpoints}/right.pth", "teacher.text=null", "distiller=kd"]
    with pytest.raises(RayStartedError):
        main(["evaluate", *RESNET8, *given])


# What is right gets as far as Ray


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of the smallest size, untrained."""
    folder = tmp_path_factory.mktemp("clip")
    clip = ClipTeacher.new(
        ["a photo of a zero"],
        image_size=32,
        patch_size=16,
        embedding_width=8,
        vision_width=8,
        vision_layers=1,
        text_width=8,
        text_layers=1,
        head_width=4,
        vocabulary_size=600,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    clip.save(str(folder))
    return folder


@pytest.mark.parametrize("command", ["run", "demo", "knowledge"])
def test_right_input_passes_the_checks(checkpoints, clip_folder, tmp_path, command):
    (tmp_path / "names.txt").write_text("\n".join(DIGITS))
    given = [
        "dataset.class_names=names.txt",
        f"teacher.visual.checkpoint={checkpoints}/right.pth",
        f"teacher.text.model={clip_folder}",
    ]
    with pytest.raises(RayStartedError):
        main([command, *RESNET8, *given])


@pytest.mark.parametrize("command", ["run", "demo", "fit-teacher", "fit-clip", "knowledge"])
def test_teachers_that_are_to_be_fitted_pass_the_checks(command):
    with pytest.raises(RayStartedError):
        main([command, *RESNET8])


def test_fitting_clip_asks_for_no_visual_teacher():
    with pytest.raises(RayStartedError):
        main(["fit-clip", *RESNET8, "teacher.visual.checkpoint=/nowhere.pth"])


# What a user cannot mend


def test_an_interruption_and_a_defect(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    def fail(*args):
        raise RuntimeError("a defect")

    monkeypatch.setattr("tmkd_ray.commands.config.read_config", interrupt)
    assert main(["config", "show"]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
    monkeypatch.setattr("tmkd_ray.commands.config.read_config", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["config", "show"])

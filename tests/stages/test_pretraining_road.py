"""LGD and embedding distillation on the whole road under a real Ray, beside a supervised student."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_road import TINY

from tmkd_ray.cli import main
from tmkd_ray.config_reading import read_config
from tmkd_ray.models import build_model
from tmkd_ray.pretraining import read_projector
from tmkd_ray.results import RunResults
from tmkd_ray.stages.experiment import open_experiment
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.types import TaskSpec

pytestmark = pytest.mark.ray


def test_pretrained_and_supervised_students_in_one_table(tiny_copy, tmp_path, capsys):
    """In mode cached, on the store that is there; LGD over class names of another task, fused."""
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nautomobile\n")
    lgd = f"{{name: lgd, teacher: fused, momentum: 0.9, bank_classes: {names}}}"
    options = [
        *[item for item in TINY if not item.startswith(("methods", "seeds"))],
        f"methods={{lgd: lgd, far: {lgd}, embedding: embedding, alone: alone}}",
        f"output={tiny_copy}",
    ]
    assert main(["run", *options]) == 0
    said = capsys.readouterr()
    assert "textual bank: 3 classes × " in said.err
    assert "LGD, zero-shot" in said.out
    assert "Zero-shot: no classifier was trained" in said.out
    folder = tiny_copy / "tiny"
    results = RunResults.load(folder / "results.json")
    measured = {method.name: (method.measured_by, method.label) for method in results.methods}
    assert measured == {
        "lgd": ("zero-shot", "LGD, zero-shot"),
        "far": ("zero-shot", "far, zero-shot"),
        "embedding": ("zero-shot", "embedding MSE, zero-shot"),
        "alone": ("classifier", "student alone"),
    }
    assert set(results.methods[0].runs[0].history[0].terms) == {"visual", "text"}
    assert any("zero-shot" in note for note in results.notes)

    # The test accuracy, again by hand: encoder and head as they lie there, the CLIP that the head names.
    (student,) = (folder / "students").glob("lgd-seed0-*/")
    encoder = build_model("resnet8", TaskSpec(tuple("0123456789"), 32))
    encoder.load_state_dict(load_file(student / "model.safetensors"))
    projector, metadata = read_projector(str(student / "projector.safetensors"))
    clip = ClipTeacher.load(metadata["clip"])
    assert metadata["clip_fingerprint"] == clip.fingerprint()
    assert int(metadata["embedding_width"]) == clip.embedding_width == 16
    experiment = open_experiment(read_config(None, options))
    config = experiment.config
    index = experiment.dataset.index("test")
    from tmkd_ray.datasets.decode import load_images

    images = load_images(experiment.dataset, "test", index)
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.dataset.mean, config.dataset.std))
    with torch.inference_mode():
        embedding = projector(encoder.eval()((pixels - mean) / std).feature)
        (texts,) = clip.text_bank([experiment.prompts()["original"]], experiment.task.class_names)
        right = (embedding @ texts.T).argmax(1).numpy() == images.labels
    assert results.methods[0].runs[0].test_accuracy == pytest.approx(np.mean(right), abs=1.5 / len(right))

    assert main(["evaluate", *options, "--split", "validation"]) == 0
    table = capsys.readouterr().out
    assert table.count("resnet8, zero-shot") == 3


@pytest.mark.parametrize("mode", ["streaming", "online"])
def test_in_the_other_modes(mode, tiny_copy, capsys):
    """The teachers are fitted already; the validation store is computed."""
    options = [
        *[item for item in TINY if not item.startswith(("methods", "seeds"))],
        "distiller=lgd",
        "training.epochs=1",
        f"knowledge.mode={mode}",
        f"output={tiny_copy}",
    ]
    assert main(["knowledge", *options]) == 0
    assert main(["distill", *options]) == 0
    out = capsys.readouterr().out
    assert "lgd seed 0: validation accuracy" in out

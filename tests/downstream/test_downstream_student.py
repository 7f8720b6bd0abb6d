"""A student is found by its folder, checkpoint or run, and built for however many classes it has."""

import pytest
import safetensors.torch
import torch

from tmkd_ray.config_reading import dump_config, read_config
from tmkd_ray.downstream.student import build_student, find_student
from tmkd_ray.errors import UserError
from tmkd_ray.models import build_model
from tmkd_ray.types import TaskSpec


def saved(folder, num_classes=7, metadata=None, model="resnet8"):
    torch.manual_seed(num_classes)
    network = build_model(model, TaskSpec(tuple(map(str, range(num_classes))), 32))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    safetensors.torch.save_file(network.inner.state_dict(), path, metadata=metadata)
    return network, path


def test_by_folder_with_the_model_in_the_metadata(tmp_path):
    _, path = saved(tmp_path / "s", metadata={"model": "resnet8"})
    for given in (tmp_path / "s", path):
        source = find_student(str(given), None)
        assert (source.checkpoint, source.model, source.mean) == (str(path), "resnet8", None)
    assert find_student(str(path), "resnet20").model == "resnet20"


def test_by_the_run_that_trained_it_with_its_normalisation_and_size(tmp_path):
    _, path = saved(tmp_path / "run" / "students" / "kd-seed0-abc")
    config = read_config(
        None, ["dataset=digits", "dataset.image_size=24", "student.model=resnet8", "dataset.mean=[0.1,0.2,0.3]"]
    )
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    for given in (tmp_path / "run", path.parent, path):
        source = find_student(str(given), None)
        assert (source.checkpoint, source.model) == (str(path), "resnet8")
        assert (source.image_size, source.mean, source.std) == (24, (0.1, 0.2, 0.3), config.dataset.std)
    saved(tmp_path / "run" / "students" / "tmkd-seed0-def")
    with pytest.raises(UserError, match=r"holds 2 students(.|\n)*kd-seed0-abc(.|\n)*tmkd-seed0-def"):
        find_student(str(tmp_path / "run"), None)


def test_what_is_not_there_or_not_said(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        find_student(str(tmp_path / "nowhere"), "resnet8")
    with pytest.raises(UserError, match="holds neither"):
        find_student(str(tmp_path), "resnet8")
    _, path = saved(tmp_path / "s")
    with pytest.raises(UserError, match="--model"):
        find_student(str(path), None)
    with pytest.raises(UserError, match="resnet9"):
        find_student(str(path), "resnet9")
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read the student's checkpoint"):
        find_student(str(path), None)


@pytest.mark.parametrize("model", ["resnet8", "torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1"])
def test_weights_are_those_of_the_file_for_its_number_of_classes(tmp_path, model):
    network, path = saved(tmp_path, 5, model=model)
    built = build_student(model, 64, str(path))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, output = network.eval()(images), built.eval()(images)
    assert output.logits.shape == (2, 5)
    assert torch.equal(output.feature, expected.feature)


def test_a_file_without_classifier_will_do(tmp_path):
    network, path = saved(tmp_path)
    state = {f"module.{k}": v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    torch.save(state, tmp_path / "bare.pth")
    built = build_student("resnet8", 32, str(tmp_path / "bare.pth"))
    for name, value in network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(built.state_dict()[name], value)
    with pytest.raises(UserError, match="does not fit"):
        build_student("resnet20", 32, str(path))


def test_random_weights_are_a_function_of_the_seed_and_draw_nothing():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build_student("resnet8", 32, None, seed).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(UserError, match="random_baseline"):
        build_student("transformers/some/model", 32, None)

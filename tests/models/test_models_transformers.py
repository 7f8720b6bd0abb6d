"""transformers' classifiers as students and visual teachers, on tiny random ones saved to a folder."""

import copy
import pickle
from pathlib import Path

import cloudpickle
import pytest
import torch
import transformers

from tmkd_ray.errors import UserError
from tmkd_ray.models import build_model, check_model_name, load_checkpoint
from tmkd_ray.types import TaskSpec

TASK = TaskSpec(("ant", "bee", "cat", "dog", "eel"), 32)
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def save(folder: Path, kind: str, num_labels: int = 5, **options: object) -> str:
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(num_labels=num_labels, **VIT, **options)
        model = transformers.ViTForImageClassification(config)
    elif kind == "vit without classifier":
        model = transformers.ViTModel(transformers.ViTConfig(num_labels=num_labels, **VIT))
    elif kind == "deit with teacher":
        config = transformers.DeiTConfig(num_labels=num_labels, **VIT)
        model = transformers.DeiTForImageClassificationWithTeacher(config)
    elif kind == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], num_labels=num_labels
        )
        model = transformers.ResNetForImageClassification(config)
    else:
        assert kind == "swin"
        config = transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], num_labels=num_labels
        )
        model = transformers.SwinForImageClassification(config)
    path = folder / kind
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "map_shapes"),
    [
        ("vit", []),
        ("resnet", [(8, 8, 8), (12, 4, 4), (16, 2, 2), (24, 1, 1)]),
        ("swin", [(8, 16, 16), (16, 8, 8)]),
    ],
)
def test_student_or_teacher(kind: str, map_shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    path = save(tmp_path, kind)
    model = build_model(f"transformers/{path}", TASK)
    assert all(module.training for module in model.modules())
    images = torch.randn(3, 3, 32, 32)

    model(images).logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    model = build_model(f"transformers/{path}", TASK).eval()
    original = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
    with torch.no_grad():
        output = model(images)
        torch.testing.assert_close(output.logits, original(images).logits)
        torch.testing.assert_close(model.head(output.feature), output.logits)
        assert output.feature.shape == (3, model.feature_width)
        assert [tuple(m.shape[1:]) for m in output.feature_maps] == map_shapes
        torch.testing.assert_close(model(images).logits, output.logits)
        for twin in (
            pickle.loads(pickle.dumps(model)),
            pickle.loads(cloudpickle.dumps(model)),
            copy.deepcopy(model),
        ):
            again = twin(images)
            torch.testing.assert_close(again.logits, output.logits)
            assert [m.shape for m in again.feature_maps] == [m.shape for m in output.feature_maps]
        # and the model that was pickled still works as before
        assert len(model(images).feature_maps) == len(map_shapes)


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    path = save(tmp_path, "vit")
    transformers.AutoModelForImageClassification.from_pretrained(path).half().save_pretrained(path)
    model = build_model(f"transformers/{path}", TASK)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_checkpoint_with_transformers_names(tmp_path: Path) -> None:
    path = save(tmp_path, "resnet")
    model = build_model(f"transformers/{path}", TASK)
    torch.nn.init.zeros_(model.head.weight)
    load_checkpoint(model, f"{path}/model.safetensors")
    original = transformers.AutoModelForImageClassification.from_pretrained(path)
    assert torch.equal(model.head.weight, original.classifier[1].weight)


def test_other_number_of_classes(tmp_path: Path) -> None:
    path = save(tmp_path, "vit", num_labels=3)
    with pytest.raises(UserError, match="tells 3 classes apart, the task has 5"):
        build_model(f"transformers/{path}", TASK)


def test_same_classes_in_another_order(tmp_path: Path) -> None:
    labels = dict(enumerate(("ant", "cat", "bee", "dog", "eel")))
    path = save(tmp_path, "vit", id2label=labels, label2id={v: k for k, v in labels.items()})
    with pytest.raises(UserError, match="label 1 is 'cat' to it, 'bee' in the task"):
        build_model(f"transformers/{path}", TASK)


def test_other_image_size(tmp_path: Path) -> None:
    path = save(tmp_path, "vit")
    with pytest.raises(UserError, match="cannot take images of 64×64 pixels"):
        build_model(f"transformers/{path}", TaskSpec(TASK.class_names, 64))


def test_without_a_trained_classifier(tmp_path: Path) -> None:
    path = save(tmp_path, "vit without classifier")
    with pytest.raises(UserError, match=r"no weights for classifier\.bias, classifier\.weight"):
        build_model(f"transformers/{path}", TASK)


def test_two_classifiers(tmp_path: Path) -> None:
    path = save(tmp_path, "deit with teacher")
    with pytest.raises(UserError, match="not those of its last linear layer"):
        build_model(f"transformers/{path}", TASK)


def test_broken_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        check_model_name(f"transformers/{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    check_model_name(f"transformers/{tmp_path}")
    with pytest.raises(UserError, match="cannot load transformers/"):
        build_model(f"transformers/{tmp_path}", TASK)


def test_hub_name_without_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "transformers/no-such-owner-here/no-such-model"
    check_model_name(name)
    with pytest.raises(UserError, match="needs internet or an earlier download"):
        build_model(name, TASK)

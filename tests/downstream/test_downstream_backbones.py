"""Feature maps of any convolutional model carry torchvision's detectors and segmentation heads."""

import copy

import pytest
import torch

from tmkd_ray.config.transfer import DetectConfig
from tmkd_ray.downstream.detectors import build_detector
from tmkd_ray.downstream.pyramid import FeatureMaps, dilate
from tmkd_ray.downstream.segmentation import Segmenter
from tmkd_ray.downstream.student import build_student
from tmkd_ray.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODELS = {
    "resnet8": ([1, 2, 4], [16, 32, 64]),
    "wrn_16_1": ([1, 2, 4], [16, 32, 64]),
    "torchvision/resnet18": ([4, 8, 16, 32], [64, 128, 256, 512]),
    "torchvision/mobilenet_v2": ([4, 8, 16, 32], [24, 32, 96, 320]),
    "torchvision/vgg11": ([2, 4, 8, 16], [128, 256, 512, 512]),
}


@pytest.mark.parametrize("name", MODELS)
def test_maps_have_the_strides_and_widths_they_say(name):
    maps = FeatureMaps(build_student(name, 128, None))
    strides, channels = MODELS[name]
    assert maps.channels == channels
    images = torch.rand(2, 3, 96, 64)
    outputs = maps.eval()(images)
    shapes = [tuple(output.shape) for output in outputs]
    assert shapes == [(2, c, 96 // s, 64 // s) for c, s in zip(channels, maps.strides, strict=True)]
    assert maps.strides == strides
    # What has no part in the maps is frozen, so that DDP waits for no gradient of it; the rest has one.
    torch.stack([output.sum() for output in maps.train()(images)]).sum().backward()
    assert {p.requires_grad for p in maps.parameters()} == {True, False}
    assert all((p.grad is not None) == p.requires_grad for p in maps.parameters())


def test_measuring_leaves_statistics_mode_and_gradients_alone():
    model = build_student("resnet8", 32, None).train()
    before = copy.deepcopy(model.state_dict())
    maps = FeatureMaps(model, 2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in maps.parameters())


def test_a_model_without_maps_is_refused():
    with pytest.raises(UserError, match="VisionTransformer"):
        FeatureMaps(build_student("torchvision/vit_b_32", 128, None))
    with pytest.raises(UserError, match="another size"):
        FeatureMaps(build_student("torchvision/vit_b_32", 64, None))


@pytest.mark.parametrize(
    ("name", "output_stride", "factor"),
    [
        ("resnet8", 2, 2),
        ("resnet8", 1, 4),
        ("torchvision/resnet18", 8, 4),
        ("torchvision/resnet18", 16, 2),
        ("torchvision/mobilenet_v2", 8, 4),
        ("torchvision/mobilenet_v2", 32, 1),
    ],
)
def test_a_dilated_network_says_the_same_at_the_old_pixels(name, output_stride, factor):
    """Same weights, same fields of view: at every pixel of the coarse map the dilated one agrees."""
    plain = build_student(name, 64, None).eval()
    dilated = copy.deepcopy(plain)
    dilate(dilated, output_stride)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        coarse, fine = plain(images).feature_maps[-1], dilated(images).feature_maps[-1]
    assert fine.shape[-1] == coarse.shape[-1] * factor
    torch.testing.assert_close(fine[..., ::factor, ::factor], coarse, atol=1e-4, rtol=1e-3)


def test_pooling_goes_on_to_shrink():
    model = build_student("torchvision/resnet18", 64, None)
    assert FeatureMaps(model, 2).strides[-1] == 4  # the stem's convolution keeps 2 → 1; its pooling halves


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "ssdlite"])
@pytest.mark.parametrize("name", ["resnet8", "torchvision/resnet18", "torchvision/mobilenet_v3_small"])
def test_detectors_learn_and_detect(name, detector):
    torch.manual_seed(0)
    config = DetectConfig(
        student="s", data="d", detector=detector, image_size=96, channels=16, head_width=32, num_proposals=30
    )
    network = build_detector(FeatureMaps(build_student(name, 128, None)), 3, config, MEAN, STD)
    images = [torch.rand(3, 96, 70), torch.rand(3, 50, 96)]
    targets = [
        {"boxes": torch.tensor([[5.0, 8, 50, 60], [1, 1, 9, 90]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = network.train()(images, targets)
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())
    with torch.no_grad():
        found = network.eval()(images)
    for image, output in zip(images, found, strict=True):
        boxes, height, width = output["boxes"], image.shape[1], image.shape[2]
        assert set(output["labels"].tolist()) <= {1, 2, 3}
        assert len(boxes) == len(output["scores"])
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()


@pytest.mark.parametrize("head", ["fcn", "deeplabv3", "lraspp"])
@pytest.mark.parametrize(("name", "output_stride"), [("resnet8", 16), ("torchvision/resnet18", 8)])
def test_segmentation_heads_learn_at_the_images_size(name, output_stride, head):
    segmenter = Segmenter(FeatureMaps(build_student(name, 128, None), output_stride), 5, head, MEAN, STD)
    images = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8)
    logits = segmenter.train()(images)
    assert logits.shape == (2, 5, 48, 40)
    logits.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in segmenter.parameters())

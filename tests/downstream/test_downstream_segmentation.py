"""Masks are checked and read right; mIoU by hand; a segmentation's training goes on where it stopped."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interrupted import StopError, StoppingContext
from PIL import Image

from tmkd_ray.config.transfer import SegmentConfig
from tmkd_ray.downstream.dense import DenseTask, Meter, total
from tmkd_ray.downstream.masks import random_crop, read_class_list, read_masks, scaled_pair
from tmkd_ray.downstream.segmentation import (
    Segmentation,
    SegmentationBatch,
    SegmentationModule,
    confusion_matrix,
    segmentation_metrics,
)
from tmkd_ray.downstream.student import build_student
from tmkd_ray.errors import UserError
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import train

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
NAMES = ("dark", "bright", "never")


def write(folder, num_images=4, height=24, width=36):
    """The left part dark, the right bright, the first row unlabelled."""
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True)
    for i in range(num_images):
        mask = np.zeros((height, width), np.uint8)
        mask[:, 10 + 4 * i :] = 1
        cv2.imwrite(str(folder / "images" / f"i{i}.png"), np.repeat(mask[:, :, None] * 180 + 30, 3, axis=2))
        mask[0] = 255
        cv2.imwrite(str(folder / "masks" / f"i{i}.png"), mask)
    return str(folder / "images"), str(folder / "masks"), NAMES


def test_pairs_are_read_as_they_are(tmp_path):
    data = read_masks(*write(tmp_path))
    assert [path.rpartition("/")[2] for path in data.paths] == [f"i{i}.png" for i in range(4)]
    image, mask = data.read(2)
    assert image.shape == (24, 36, 3)
    assert np.unique(mask).tolist() == [0, 1, 255]
    assert (image[1:, :, 0] == mask[1:] * 180 + 30).all()
    # A paletted mask holds indices, whatever its colours.
    paletted = Image.fromarray(mask).convert("P")
    paletted.putdata(mask.ravel().tolist())
    paletted.putpalette([200, 10, 10] * 256)
    paletted.save(tmp_path / "masks" / "i2.png")
    assert (data.read(2)[1] == mask).all()


def test_bad_masks_are_refused_by_name(tmp_path):
    data = read_masks(*write(tmp_path))
    mask = np.zeros((24, 36), np.uint8)
    mask[3, :7] = 3
    cv2.imwrite(str(tmp_path / "masks" / "i0.png"), mask)
    with pytest.raises(
        UserError, match=r"masks/i0\.png has values that are no class, 3 for one, in 7 pixels.* 0 to 2"
    ):
        data.read(0)
    cv2.imwrite(str(tmp_path / "masks" / "i1.png"), mask[:, :20])
    with pytest.raises(UserError, match=r"masks/i1\.png is 20×24 pixels, its image .*i1\.png 36×24"):
        data.read(1)
    cv2.imwrite(str(tmp_path / "masks" / "i2.png"), np.zeros((24, 36, 3), np.uint8))
    with pytest.raises(UserError, match=r"masks/i2\.png is a RGB image"):
        data.read(2)
    (tmp_path / "masks" / "i3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"masks/i3\.png is no PNG"):
        data.read(3)
    whole = (tmp_path / "masks" / "i0.png").read_bytes()
    (tmp_path / "masks" / "i3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"masks/i3\.png: "):
        data.read(3)


def test_files_that_are_missing_or_double(tmp_path):
    folders = write(tmp_path)
    (tmp_path / "masks" / "i1.png").unlink()
    with pytest.raises(UserError, match=r"no mask of the same name in .*masks; the first is .*images/i1\.png"):
        read_masks(*folders)
    (tmp_path / "images" / "i1.png").unlink()
    (tmp_path / "images" / "i2.png").unlink()
    with pytest.raises(UserError, match=r"no image of the same name in .*images; the first is .*masks/i2\.png"):
        read_masks(*folders)
    (tmp_path / "masks" / "i2.png").unlink()
    assert len(read_masks(*folders)) == 2
    (tmp_path / "images" / "i0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"two files i0\.\*"):
        read_masks(*folders)
    with pytest.raises(UserError, match="no images"):
        read_masks(str(tmp_path / "none"), folders[1], NAMES)


def test_class_lists(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sky\n\nroad \n")
    assert read_class_list(str(path)) == ("sky", "road")
    path.write_text("sky\n")
    with pytest.raises(UserError, match=r"classes\.txt: 1 class names"):
        read_class_list(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_class_list(str(path))


def test_iou_by_hand():
    labels = np.array([[0, 0, 1, 255], [1, 1, 1, 255]])
    predicted = np.array([[0, 1, 1, 0], [1, 1, 0, 2]])
    confusion = confusion_matrix(labels, predicted, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    metrics = segmentation_metrics(confusion)
    assert metrics.iou == (1 / 3, 3 / 5, None, None)
    assert metrics.mean_iou == pytest.approx((1 / 3 + 3 / 5) / 2)
    assert metrics.pixel_accuracy == pytest.approx(4 / 6)
    # A class that is predicted, but never there, counts as 0.
    wrong = segmentation_metrics(confusion_matrix(np.array([0, 0]), np.array([0, 2]), 3))
    assert wrong.iou == (0.5, None, 0.0)
    assert wrong.mean_iou == 0.25
    assert segmentation_metrics(np.zeros((2, 2), np.int64)).mean_iou == 0.0


def test_scaling_keeps_classes_and_places():
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 15:] = 2
    mask[:10] = 255
    image = np.repeat(mask[:, :, None], 3, axis=2)
    for shorter in (10, 40, 25.3):
        scaled, labels = scaled_pair(image, mask, shorter)
        assert labels.shape == scaled.shape[:2] == (round(shorter), round(1.5 * shorter))
        assert np.unique(labels).tolist() == [0, 2, 255]
        edge = labels.shape[1] / 2
        assert (labels[-1, : int(edge)] == 0).all()
        assert (labels[-1, int(edge + 0.5) :] == 2).all()


def test_crops_are_parts_or_filled_up():
    mask = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image = np.repeat(mask[:, :, None], 3, axis=2)
    fill = np.array([1, 2, 3], np.uint8)
    seen = set()
    for seed in range(60):
        cropped, labels = random_crop(image, mask, 5, np.random.default_rng(seed), fill)
        top, left = divmod(int(labels[0, 0]), 8)
        seen.add((top, left))
        assert (labels == mask[top : top + 5, left : left + 5]).all()
        assert (cropped[:, :, 0] == labels).all()
    assert seen == {(top, left) for top in range(2) for left in range(4)}
    cropped, labels = random_crop(image, mask, 7, np.random.default_rng(0), fill)
    assert labels.shape == (7, 7)
    assert (labels[6] == 255).all()
    assert (cropped[6] == fill).all()
    assert (cropped[:6, :, 0] == labels[:6]).all()


def config(**changes):
    training = {
        "epochs": 3,
        "batch_size": 2,
        "num_workers": 1,
        "learning_rate": 0.05,
        "loggers": [],
        "warmup_epochs": 0,
    }
    return SegmentConfig.model_validate(
        {"student": "s", "data": "d", "image_size": 16, "training": training, **changes}
    )


def segmenter(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Segmentation(config(), MEAN, STD).build(build_student("resnet8", 128, None, seed), len(NAMES))


def test_the_loss_is_the_mean_over_labelled_pixels():
    module = SegmentationModule(segmenter()).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(0, 3, (2, 16, 16), dtype=torch.uint8)
    labels[0, :9] = 255
    output = module(SegmentationBatch(images, labels, torch.arange(2)))
    logits = module.segmenter(images).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = [
        (-log_p[b, int(labels[b, y, x]), y, x])
        for b, y, x in zip(*np.nonzero(labels.numpy() != 255), strict=True)
    ]
    assert float(output.loss.loss.detach()) == pytest.approx(np.mean(rows), rel=1e-5)
    nothing = module(SegmentationBatch(images, torch.full_like(labels, 255), torch.arange(2)))
    assert float(nothing.loss.loss.detach()) == 0.0


class Brightness(torch.nn.Module):
    """Tells bright from dark."""

    def forward(self, images):
        bright = (images[:, 0] > 120).long()
        return F.one_hot(bright, 3).permute(0, 3, 1, 2).float()


class Dark(torch.nn.Module):
    """Sees dark everywhere."""

    def forward(self, images):
        return F.one_hot(torch.zeros_like(images[:, 0]).long(), 3).permute(0, 3, 1, 2).float()


def test_every_labelled_pixel_counts_once_at_the_masks_own_size(tmp_path):
    folders = write(tmp_path)
    # An image of another size among them: batches are of like sizes.
    mask = np.ones((30, 30), np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "i1.png"), np.repeat(mask[:, :, None] * 180 + 30, 3, axis=2))
    cv2.imwrite(str(tmp_path / "masks" / "i1.png"), mask)
    data = read_masks(*folders)
    kind = Segmentation(config(image_size=24), MEAN, STD)
    meter = Meter(kind, {"a": Brightness(), "b": Dark()}, data).to("cpu")
    parts = [meter(np.array([0, 1, 2])), meter(np.array([3])), meter(np.array([], dtype=np.int64))]
    whole = total([part["a"] for part in parts])
    labelled = 3 * 23 * 36 + 30 * 30
    assert whole.sum() == labelled
    assert whole[2].sum() == 0
    assert np.trace(whole) / labelled > 0.97
    assert total([part["b"] for part in parts])[:, 1:].sum() == 0
    small_kind = Segmentation(config(image_size=16), MEAN, STD)
    small = Meter(small_kind, {"a": Brightness()}, data).to("cpu")(np.arange(4))["a"]
    assert small.sum() == labelled
    assert np.trace(small) / labelled > 0.9


def test_two_workers_judge_an_epoch_as_one(tmp_path):
    """Each sees its own validation images; what they find is added up before the score is taken."""
    data = read_masks(*write(tmp_path, num_images=3))
    task = DenseTask(Segmentation(config(), MEAN, STD), segmenter(), data, data)
    task.network.eval()
    alone = task.validate(PlainContext(tmp_path, quiet=True))
    found = []
    for rank in range(2):
        context = PlainContext(tmp_path, quiet=True)
        context.rank, context.world_size = rank, 2
        context.gather = lambda value: found.append(value) or found
        together = task.validate(context)
    assert [int(part.sum()) for part in found] == [2 * 23 * 36, 23 * 36]
    assert together == alone


def test_resumed_training_ends_in_the_same_weights(tmp_path):
    data = read_masks(*write(tmp_path))
    settings = config()

    def task(seed=0):
        kind = Segmentation(settings, MEAN, STD)
        return DenseTask(kind, segmenter(seed), data, data.take(np.array([0, 1])))

    first = task()
    whole = train(first, settings.training, PlainContext(tmp_path / "whole", quiet=True), "key", "test")
    with pytest.raises(StopError):
        train(task(), settings.training, StoppingContext(tmp_path / "part", 2), "key", "test")
    resumed = task(seed=9)
    rest = train(resumed, settings.training, PlainContext(tmp_path / "part", quiet=True), "key", "test")
    for name, value in first.kept.state_dict().items():
        assert torch.equal(value, resumed.kept.state_dict()[name]), name
    assert [r.loss for r in rest.history] == [r.loss for r in whole.history]
    assert whole.history[-1].loss < whole.history[0].loss
    assert whole.accuracy == max(r.validation_accuracy for r in whole.history)


def test_augmentation_is_drawn_by_epoch_and_image_alone(tmp_path):
    data = read_masks(*write(tmp_path))
    task = DenseTask(Segmentation(config(crop_size=20), MEAN, STD), segmenter(), data, data)
    context = PlainContext(tmp_path, quiet=True)
    epoch = list(task.batches(1, context))
    assert epoch[0].images.shape == (2, 3, 20, 20)
    assert epoch[0].labels.dtype == torch.uint8
    (second,) = task.batches(1, context, first_step=1)
    assert torch.equal(second.images, epoch[1].images)
    assert torch.equal(second.labels, epoch[1].labels)
    other = {
        int(i): m
        for batch in task.batches(2, context)
        for i, m in zip(batch.indices, batch.images, strict=True)
    }
    assert all(
        not torch.equal(image, other[int(i)])
        for batch in epoch
        for i, image in zip(batch.indices, batch.images, strict=True)
    )
    # Image and mask go through the same: dark stays dark.
    for batch in epoch:
        dark, bright = batch.images[:, 0][batch.labels == 0], batch.images[:, 0][batch.labels == 1]
        assert dark.float().mean() < 60
        assert bright.float().mean() > 170

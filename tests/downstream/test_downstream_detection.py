"""COCO data is checked and read right; average precision; a detector's training goes on where it stopped."""

import json
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from interrupted import StopError, StoppingContext

from tmkd_ray.config.transfer import DetectConfig
from tmkd_ray.downstream.coco import METRICS, Detections, average_precision, read_coco, require_pycocotools
from tmkd_ray.downstream.dense import DenseTask, Meter
from tmkd_ray.downstream.detection import Detection, DetectionModule, make_batch
from tmkd_ray.downstream.student import build_student
from tmkd_ray.errors import UserError
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import train

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def tree(num_images=4, width=60, height=40):
    """A bright rectangle on each image; categories 7 and 3, so that labels follow the ids, not the list."""
    images = [
        {"id": 10 + i, "file_name": f"i{i}.png", "width": width, "height": height} for i in range(num_images)
    ]
    annotations = [
        {
            "id": i,
            "image_id": 10 + i,
            "category_id": (7, 3)[i % 2],
            "bbox": [5 + 2 * i, 4, 20, 16],
            "iscrowd": 0,
        }
        for i in range(num_images)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }


def write(folder, content):
    (folder / "images").mkdir(exist_ok=True)
    for image in content["images"]:
        pixels = np.full((40, 60, 3), 40, np.uint8)
        for entry in content["annotations"]:
            if entry.get("image_id") == image["id"]:
                x, y, w, h = (int(value) for value in entry["bbox"])
                pixels[y : y + h, x : x + w] = (220, 200, 180)
        cv2.imwrite(str(folder / "images" / image["file_name"].rpartition("/")[2]), pixels)
    (folder / "a.json").write_text(json.dumps(content))
    return str(folder / "a.json"), str(folder / "images")


def test_labels_follow_the_ids_and_boxes_are_corners(tmp_path):
    data = read_coco(*write(tmp_path, tree()))
    assert data.class_names == ("three", "seven")
    assert [image.labels.tolist() for image in data.images] == [[1], [0], [1], [0]]
    assert data.images[2].boxes.tolist() == [[9, 4, 29, 20]]
    assert data.images[2].areas.tolist() == [320]
    assert data.read(0).shape == (40, 60, 3)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([5, 5, 0, 4], "has no area"),
        ([5, 5, 4, -1], "has no area"),
        ([50, 5, 20, 4], "leaves its image of 60×40 pixels"),
        ([-3, 5, 20, 4], "leaves its image"),
        ([60.5, 5, 0.4, 4], "has no area within its image"),
    ],
)
def test_bad_boxes_are_refused_by_file_and_image_or_dropped(tmp_path, box, problem):
    content = tree()
    content["annotations"][1]["bbox"] = box
    path, folder = write(tmp_path, tree())
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"a\.json: annotation 1 of i1\.png: the box .* {problem}.*bad_boxes=drop"
    ):
        read_coco(path, folder)
    data = read_coco(path, folder, "drop")
    assert data.num_dropped == 1
    assert data.images[1].boxes.shape == (0, 4)


def test_a_box_that_sticks_out_by_rounding_is_clipped(tmp_path):
    content = tree()
    content["annotations"][0]["bbox"] = [-0.5, 30, 20, 10.7]
    path, folder = write(tmp_path, tree())
    (tmp_path / "a.json").write_text(json.dumps(content))
    np.testing.assert_allclose(read_coco(path, folder).images[0].boxes, [[0, 30, 19.5, 40]])


def changed(change):
    content = tree()
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "list of objects 'images'"),
        (changed(lambda c: c.pop("categories")), "'categories'"),
        (changed(lambda c: c["images"].clear()), "0 images"),
        (changed(lambda c: c["images"][0].pop("width")), "has no 'width'"),
        (changed(lambda c: c["images"][1].update(id=10)), "the id 10 is given twice"),
        (changed(lambda c: c["images"][1].update(file_name="i0.png")), "i0.png is listed twice"),
        (changed(lambda c: c["images"][1].update(height=0)), "60×0"),
        (changed(lambda c: c["annotations"][0].update(image_id=99)), "there is no image_id 99"),
        (changed(lambda c: c["annotations"][0].update(category_id=1)), "there is no category_id 1"),
        (changed(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), "is not four numbers"),
        (changed(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")])), "is not four numbers"),
        (changed(lambda c: c["annotations"][0].update(area="big")), "no number"),
        (
            changed(lambda c: c["images"][1].update(file_name="none.png")),
            r"1 of 4 files are not in .*: none\.png",
        ),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, problem):
    path, folder = write(tmp_path, tree())
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json.*{problem}"):
        read_coco(path, folder, "drop")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/passwd",
        "a/../../secret.png",
        "..\\secret.png",
        "s3://x/y.png",
        "~/x.png",
        "",
        "C:\\x",
    ],
)
def test_file_names_cannot_leave_the_image_folder(tmp_path, name):
    path, folder = write(tmp_path, tree())
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "a.json").write_text(changed(lambda c: c["images"][0].update(file_name=name)))
    with pytest.raises(UserError, match=r"a\.json: the file name .* leads out of the image folder"):
        read_coco(path, folder)


def test_links_cannot_leave_the_image_folder_either(tmp_path):
    path, folder = write(tmp_path, tree())
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "images" / "i0.png").unlink()
    (tmp_path / "images" / "i0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="is a link that leads out"):
        read_coco(path, folder)
    (tmp_path / "images" / "i0.png").unlink()
    (tmp_path / "images" / "i0.png").symlink_to(tmp_path / "images" / "i1.png")
    assert len(read_coco(path, folder)) == 4


def test_an_image_of_another_size_or_damaged_is_refused_when_read(tmp_path):
    path, folder = write(tmp_path, tree())
    data = read_coco(path, folder)
    cv2.imwrite(f"{folder}/i0.png", np.zeros((60, 40, 3), np.uint8))
    with pytest.raises(UserError, match=r"i0\.png is 40×60 pixels, but .*a\.json says 60×40"):
        data.read(0)
    (tmp_path / "images" / "i1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"i1\.png: not an image"):
        data.read(1)


def test_batches_are_scaled_and_mirrored_with_their_boxes(tmp_path):
    content = tree()
    content["annotations"].append(
        {"id": 9, "image_id": 10, "category_id": 3, "bbox": [30, 10, 12, 8], "iscrowd": 1}
    )
    content["annotations"].append({"id": 8, "image_id": 10, "category_id": 3, "bbox": [40, 20, 12, 8]})
    data = read_coco(*write(tmp_path, content))
    batch = make_batch(data, [0, 1], 30, [False, True])
    assert batch.images.shape == (2, 3, 30, 30)
    assert batch.sizes.tolist() == [[20, 30], [20, 30]]
    assert batch.labels.tolist() == [[1, 0], [0, -1]]  # the crowd is left out
    # Half the size; mirrored, x becomes 30 - x.
    np.testing.assert_allclose(batch.boxes[0], [[2.5, 2, 12.5, 10], [20, 10, 26, 14]])
    np.testing.assert_allclose(batch.boxes[1, 0], [30 - 13.5, 2, 30 - 3.5, 10])
    assert (batch.images[:, :, 20:] == 0).all()
    for row in range(2):
        x1, y1, x2, y2 = batch.boxes[row, 0].round().int().tolist()
        assert batch.images[row, :, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() >= 180
        assert batch.images[row, :, 15:20, :2].max() == 40


class Listening(torch.nn.Module):
    """A detector that keeps what it is given."""

    def forward(self, images, targets):
        self.images, self.targets = images, targets
        return {"boxes": torch.tensor(1.5), "labels": torch.tensor(2.0)}


def test_class_names_count_from_one_for_the_detector(tmp_path):
    """The background is its class 0; it is given each image at its own size, and its losses are summed."""
    data = read_coco(*write(tmp_path, tree()))
    batch = make_batch(data, [0, 1], 30, [False, False])
    detector = Listening()
    output = DetectionModule(detector)(batch)
    assert [target["labels"].tolist() for target in detector.targets] == [[2], [1]]
    assert torch.equal(detector.targets[0]["boxes"], batch.boxes[0])
    assert [tuple(image.shape) for image in detector.images] == [(3, 20, 30)] * 2
    assert torch.equal(detector.images[1], batch.images[1, :, :20].float() / 255)
    assert output.loss.loss == 3.5


def found_as(data, change=lambda boxes: boxes, score=0.9):
    return [
        Detections(image.id, change(image.boxes.astype(float)), image.labels, np.full(len(image.boxes), score))
        for image in data.images
    ]


def only(found, kept):
    return replace(found, boxes=found.boxes[kept], labels=found.labels[kept], scores=found.scores[kept])


def test_average_precision_of_what_is_known(tmp_path):
    data = read_coco(*write(tmp_path, tree()))
    perfect = average_precision(data, found_as(data))
    assert list(perfect) == list(METRICS)
    assert perfect["mAP"] == perfect["AP50"] == perfect["AP75"] == perfect["AP small"] == pytest.approx(1.0)
    assert perfect["AP large"] is None  # there is no such object
    # Shifted by 4 of 20 pixels: IoU 16·16 / (2·20·16 - 16·16) = 2/3, right at thresholds .5, .55, .6 and .65.
    shifted = average_precision(data, found_as(data, lambda boxes: boxes + np.array([4, 0, 4, 0])))
    assert shifted["AP50"] == pytest.approx(1.0)
    assert shifted["AP75"] == 0.0
    assert shifted["mAP"] == pytest.approx(0.4)
    # One of the two categories is never found.
    half = [only(entry, entry.labels == 1) for entry in found_as(data)]
    assert average_precision(data, half)["mAP"] == pytest.approx(0.5)
    nothing = [only(entry, entry.labels == 9) for entry in found_as(data)]
    assert average_precision(data, nothing)["mAP"] == 0.0
    assert average_precision(data, nothing)["AP large"] is None
    # The order of the images does not matter; an image that comes twice is a defect.
    assert average_precision(data, found_as(data)[::-1]) == perfect
    with pytest.raises(AssertionError):
        average_precision(data, found_as(data) + found_as(data)[:1])


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong(tmp_path):
    content = tree()
    content["annotations"].append(
        {"id": 9, "image_id": 10, "category_id": 7, "bbox": [30, 25, 25, 12], "iscrowd": 1}
    )
    data = read_coco(*write(tmp_path, content))
    assert average_precision(data, found_as(data))["mAP"] == pytest.approx(1.0)


def test_without_pycocotools_the_user_is_told(monkeypatch):
    require_pycocotools()
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(UserError, match=r"pip install 'tmkd-ray\[detection\]'"):
        require_pycocotools()


def config(**changes):
    training = {
        "epochs": 3,
        "batch_size": 2,
        "num_workers": 1,
        "learning_rate": 0.02,
        "loggers": [],
        "warmup_epochs": 0,
    }
    fields = {"image_size": 32, "channels": 8, "head_width": 16, "num_proposals": 20}
    return DetectConfig.model_validate({"student": "s", "data": "d", **fields, "training": training, **changes})


def task(data, settings, seed=0):
    kind = Detection(settings, MEAN, STD)
    detector = kind.build(build_student("resnet8", 128, None, seed), 2)
    return DenseTask(kind, detector, data, data.take(np.array([0, 1])))


@pytest.mark.parametrize("detector", ["faster_rcnn", "ssdlite"])
def test_resumed_training_ends_in_the_same_weights(tmp_path, detector):
    data = read_coco(*write(tmp_path, tree()))
    settings = config(detector=detector)
    torch.manual_seed(0)
    first = task(data, settings)
    initial = {name: value.clone() for name, value in first.kept.state_dict().items()}
    whole = train(first, settings.training, PlainContext(tmp_path / "whole", quiet=True), "key", "test")
    assert len(whole.history) == 3
    assert any(not torch.equal(value, initial[name]) for name, value in first.kept.state_dict().items())
    torch.manual_seed(0)
    with pytest.raises(StopError):
        train(task(data, settings), settings.training, StoppingContext(tmp_path / "part", 1), "key", "test")
    # Another initialisation, which the checkpoint overwrites.
    torch.manual_seed(9)
    resumed = task(data, settings, seed=9)
    rest = train(resumed, settings.training, PlainContext(tmp_path / "part", quiet=True), "key", "test")
    for name, value in first.kept.state_dict().items():
        assert torch.equal(value, resumed.kept.state_dict()[name]), name
    assert [r.loss for r in rest.history] == [r.loss for r in whole.history]
    assert set(whole.history[0].terms) >= (
        {"classification"} if detector == "ssdlite" else {"loss_rpn_box_reg"}
    )


def test_batches_skip_what_was_trained_and_share_among_workers(tmp_path):
    data = read_coco(*write(tmp_path, tree()))
    one = task(data, config())
    context = PlainContext(tmp_path, quiet=True)
    whole = list(one.batches(1, context))
    assert sorted(torch.cat([batch.indices for batch in whole]).tolist()) == [0, 1, 2, 3]
    (last,) = one.batches(1, context, first_step=1)
    assert torch.equal(last.images, whole[1].images)
    assert torch.equal(last.boxes, whole[1].boxes)
    parts = []
    for rank in range(2):
        context.rank, context.world_size = rank, 2
        parts.append(next(iter(one.batches(1, context))))
    assert torch.equal(torch.cat([part.images for part in parts]), whole[0].images)
    never, always = (Detection(config(flip=flip), MEAN, STD).batch(data, [2], 0).images for flip in (0, 1))
    assert torch.equal(never[..., :32].flip(-1), always[..., :32])
    drawn = [Detection(config(), MEAN, STD).batch(data, [2], epoch).images for epoch in range(8)]
    assert all(torch.equal(images, never) or torch.equal(images, always) for images in drawn)
    assert len({images.numpy().tobytes() for images in drawn}) == 2, "epochs draw anew"


def test_parts_of_the_data(tmp_path):
    write(tmp_path, tree())
    settings = config(data=str(tmp_path), train="a.json", test="a.json", validation_fraction=0.3)
    parts = Detection(settings, MEAN, STD).read()
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (3, 1, 4)
    assert set(parts.train.paths) | set(parts.validation.paths) == set(parts.test.paths)
    whole = Detection(settings.model_copy(update={"validation": "a.json"}), MEAN, STD).read()
    assert (len(whole.train), len(whole.validation)) == (4, 4)
    content = tree()
    content["categories"][0]["name"] = "eight"
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"b\.json has other categories than .*a\.json: three, eight and three"):
        Detection(settings.model_copy(update={"test": "b.json"}), MEAN, STD).read()


class Oracle(torch.nn.Module):
    """A detector that finds the bright rectangle."""

    def forward(self, images):
        found = []
        for image in images:
            rows, columns = (image.amin(0) > 0.5).nonzero().T
            box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            found.append({"boxes": box[None], "labels": torch.tensor([1]), "scores": torch.tensor([0.5])})
        return found


def test_predictions_are_in_the_images_own_pixels(tmp_path):
    data = read_coco(*write(tmp_path, tree()))
    for size in (32, 60, 120):
        kind = Detection(config(image_size=size), MEAN, STD)
        found = Meter(kind, {"a": Oracle()}, data).to("cpu")(np.array([2, 0, 3]))["a"]
        assert [entry.image_id for entry in found] == [12, 10, 13]
        for entry, position in zip(found, (2, 0, 3), strict=True):
            np.testing.assert_allclose(entry.boxes, data.images[position].boxes, atol=2)
            assert entry.labels.tolist() == [0]

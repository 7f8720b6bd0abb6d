"""Fitting the visual teacher and CLIP on views of digits."""

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_samples import (
    CIFAR,
    PROMPTS,
    SIZE,
    assert_same_weights,
    build_clip,
    clip_task,
    digits,
    run,
    teacher_task,
    training,
    views,
)

from tmkd_ray.augmentation import augment, draw_parameters, sample_keys
from tmkd_ray.datasets.digits import CLASS_NAMES
from tmkd_ray.models import build_model, load_checkpoint
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.training.augmented_views import AugmentedViews, ViewBatch
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loader import epoch_order
from tmkd_ray.types import TaskSpec
from tmkd_ray.views.base import ImageBatch, View

pytestmark = pytest.mark.timeout(60)  # a thread that does not end would hang the suite

CPU = torch.device("cpu")
SEED = 6


def resnet8() -> ImageClassifier:
    return build_model("resnet8", TaskSpec(CLASS_NAMES, SIZE))


def augmented(num_images: int = 60, seen_through: list[View] | None = None) -> AugmentedViews:
    chosen = list(views().values()) if seen_through is None else seen_through
    return AugmentedViews(digits(0, num_images), chosen, CIFAR, SEED)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Whatever a test does, the threads that prepare batches end with it."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) - before == set()


def test_every_image_once_through_one_view() -> None:
    """Each is cropped anew by (seed, id, epoch), then seen through the view that is told."""
    loaded, data = digits(0, 60), augmented()
    keys = sample_keys(loaded.ids, SEED)
    counts = np.zeros(2, dtype=int)
    for epoch in (0, 3):
        parameters = draw_parameters(CIFAR, keys, np.array([epoch]), SIZE)[:, 0]
        order = epoch_order(60, SEED, epoch).tolist()
        batches = list(data.batches(epoch, 16, 0, 1, CPU))
        assert [len(batch.labels) for batch in batches] == [16, 16, 16]
        images = torch.cat([batch.images for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        chosen = torch.cat([batch.view_indices for batch in batches])
        assert (images.dtype, images.shape) == (torch.uint8, (48, SIZE, SIZE, 3))
        for position, row in enumerate(order[:48]):
            image, drawn = torch.from_numpy(loaded.images[row][None]), torch.from_numpy(parameters[row][None])
            crop = augment(image, drawn).numpy()
            view = list(views().values())[int(chosen[position])]
            np.testing.assert_array_equal(images[position], view(crop)[0])
            assert labels[position] == loaded.labels[row]
        counts += np.bincount(chosen, minlength=2)
    assert counts.min() > 25, "of 96, either view has its share"


def test_epochs_differ_and_can_be_repeated() -> None:
    data = augmented()
    first, again, later = (next(iter(data.batches(epoch, 60, 0, 1, CPU))) for epoch in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.view_indices, again.view_indices)
    assert not torch.equal(first.view_indices, later.view_indices)
    assert not torch.equal(first.images, later.images)


def test_workers_share_a_batch() -> None:
    data = augmented()
    whole = list(data.batches(2, 16, 0, 1, CPU))
    parts = [list(data.batches(2, 16, rank, 2, CPU)) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        for name in ("images", "labels", "view_indices"):
            joined = torch.cat([getattr(part[number], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))


def test_the_images_in_memory_stay_as_they_are() -> None:
    before = digits(0, 60).images.copy()
    list(augmented().batches(0, 16, 0, 1, CPU))
    np.testing.assert_array_equal(digits(0, 60).images, before)


class CountingView(View):
    """Counts its calls; fails at one of them."""

    def __init__(self, fails_at: int = -1) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, images_BHWC: ImageBatch) -> ImageBatch:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("a broken view")
        return images_BHWC


@pytest.mark.parametrize("leave_by", ["close", "garbage collection", "exception"])
def test_the_thread_ends_when_the_consumer_leaves_early(leave_by: str) -> None:
    """At once, though it had prepared batches ahead and was waiting to hand them over."""
    before = threading.active_count()
    view = CountingView()
    batches = augmented(60, [view]).batches(0, 2, 0, 1, CPU)
    next(batches)
    deadline = time.monotonic() + 5
    while view.calls < 5 and time.monotonic() < deadline:
        time.sleep(0.01)  # until the queue is full
    assert threading.active_count() == before + 1
    started = time.monotonic()
    if leave_by == "close":
        batches.close()  # type: ignore[attr-defined]
    elif leave_by == "garbage collection":
        del batches
        gc.collect()
    else:
        with pytest.raises(ZeroDivisionError):
            batches.throw(ZeroDivisionError())  # type: ignore[attr-defined]
    assert time.monotonic() - started < 2
    assert threading.active_count() == before
    assert view.calls < 10, "it does not prepare the whole epoch"


def test_the_thread_ends_with_the_epoch() -> None:
    before = threading.active_count()
    assert len(list(augmented().batches(0, 16, 0, 1, CPU))) == 3
    assert threading.active_count() == before


@pytest.mark.parametrize("fails_at", [1, 3])
def test_what_goes_wrong_in_the_thread_is_raised_to_the_consumer(fails_at: int) -> None:
    """After the batches that were good; the epoch does not just end, nor hang."""
    seen: list[ViewBatch] = []
    with pytest.raises(RuntimeError, match="a broken view"):
        seen.extend(_collected(augmented(60, [CountingView(fails_at)]).batches(0, 10, 0, 1, CPU), seen))
    assert len(seen) == fails_at - 1


def _collected(batches: Iterator[ViewBatch], seen: list[ViewBatch]) -> list[ViewBatch]:
    for batch in batches:
        seen.append(batch)
    return []


def test_nothing_is_prepared_before_it_is_asked_for() -> None:
    before = threading.active_count()
    augmented().batches(0, 16, 0, 1, CPU)
    assert threading.active_count() == before


def test_teacher_learns_digits(tmp_path: Path) -> None:
    config = training(epochs=8, batch_size=32, learning_rate=0.1)
    task = teacher_task(config, resnet8(), num_images=300)
    outcome = run(task, config, tmp_path)
    assert outcome.accuracy > 0.5
    losses = [record.terms["ce"] for record in outcome.history]
    assert losses[-1] < 0.5 * losses[0]
    task.save(str(tmp_path / "saved"), outcome.weights)
    loaded = resnet8()
    load_checkpoint(loaded, str(tmp_path / "saved" / "model.safetensors"))
    assert_same_weights(loaded.state_dict(), outcome.weights)


def test_teacher_is_judged_on_every_view(tmp_path: Path) -> None:
    task = teacher_task(training(), resnet8())
    task.module.eval()
    metrics = task.validate(PlainContext(tmp_path))
    validation = digits(500, 600)
    for name, view in views().items():
        pixels = (view(validation.images) / 255.0 - 0.309) / 0.349
        with torch.inference_mode():
            logits = task.kept(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()).logits
        expected = (logits.argmax(1).numpy() == validation.labels).mean()
        assert metrics[f"{name}_accuracy"] == pytest.approx(expected, abs=0.011)
    assert metrics["accuracy"] == pytest.approx((metrics["original_accuracy"] + metrics["edge_accuracy"]) / 2)


def test_label_smoothing(tmp_path: Path) -> None:
    """The loss at the first step, by the formula: smoothed labels against the log-probabilities."""
    config = training(label_smoothing=0.2)
    task = teacher_task(config, resnet8())
    task.module.eval()
    (batch,) = task.data.batches(0, 40, 0, 1, CPU)
    output = task.module(batch)
    with torch.inference_mode():
        logits = task.kept(task.module.normalize(batch.images)).logits.double().numpy()
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.full((40, 10), 0.02)
    target[np.arange(40), batch.labels] += 0.8
    expected = -(target * log_probability).sum(1).mean()
    assert output.loss.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.correct == (logits.argmax(1) == batch.labels.numpy()).sum()


def test_clip_learns_digits_and_is_saved_as_it_is(tmp_path: Path) -> None:
    config = training(epochs=12, batch_size=8, optimizer="adamw", learning_rate=5e-4, warmup_epochs=1)
    task = clip_task(config, num_images=400)
    outcome = run(task, config, tmp_path)
    assert outcome.accuracy > 0.3
    losses = [record.terms["contrastive"] for record in outcome.history]
    assert losses[-1] < 0.7 * losses[0]

    folder = str(tmp_path / "saved")
    task.save(folder, outcome.weights)
    loaded = ClipTeacher.load(folder)
    assert_same_weights({name: loaded.model.state_dict()[name] for name in outcome.weights}, outcome.weights)
    clip = task.module.clip.eval()
    images = torch.from_numpy(digits(500, 600).images)
    with torch.inference_mode():
        assert torch.equal(loaded.encode_images(images), clip.encode_images(images))
    bank = clip.text_bank(PROMPTS, CLASS_NAMES)
    assert torch.equal(loaded.text_bank(PROMPTS, CLASS_NAMES), bank)
    assert loaded.temperature == clip.temperature
    assert loaded.fingerprint() == clip.fingerprint()
    assert loaded.text_fingerprint() == clip.text_fingerprint()
    assert (loaded.image_size, loaded.embedding_width) == (SIZE, 24)
    assert loaded.mean == pytest.approx(clip.mean)
    assert loaded.std == pytest.approx(clip.std)

    accuracies = []
    for view, text_CE in zip(views().values(), bank, strict=True):
        with torch.inference_mode():
            embedding = loaded.encode_images(torch.from_numpy(view(digits(500, 600).images)))
        accuracies.append(((embedding @ text_CE.T).argmax(1).numpy() == digits(500, 600).labels).mean())
    assert outcome.accuracy == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_captions_of_clip() -> None:
    """Row `first[v][p] + c` of the tokens is template p of view v, filled with class c."""
    task = clip_task(training())
    module = task.module
    assert module.first == [[0, 10], [20]]
    for v, templates in enumerate(PROMPTS):
        for p, template in enumerate(templates):
            for c, name in enumerate(CLASS_NAMES):
                row = module.input_ids[module.first[v][p] + c]
                mask = module.attention_mask[module.first[v][p] + c].bool()
                alone = module.clip.tokenize([template.format(name)])["input_ids"][0]
                assert row[mask].tolist() == alone.tolist()


def test_clip_loss_by_the_formula() -> None:
    """Images of one class and view share a caption, and compete with captions of their own view alone; the
    prompts are those the generator draws."""
    task = clip_task(training())
    module = task.module.eval()
    (batch,) = task.data.batches(0, 40, 0, 1, CPU)
    torch.manual_seed(3)
    output = module(batch)
    torch.manual_seed(3)
    drawn = [int(torch.randint(len(templates), ())) for templates in PROMPTS]
    texts = [
        PROMPTS[v][drawn[v]].format(CLASS_NAMES[c])
        for v, c in zip(batch.view_indices.tolist(), batch.labels.tolist(), strict=True)
    ]
    captions = sorted(set(texts), key=texts.index)
    with torch.inference_mode():
        image = module.clip.encode_images(batch.images).double().numpy()
        text = torch.cat([module.clip.encode_texts(module.clip.tokenize([caption])) for caption in captions])
    view = dict(zip(texts, batch.view_indices.tolist(), strict=True))
    same_view = batch.view_indices.numpy()[:, None] == [view[caption] for caption in captions]
    logits = np.where(same_view, image @ text.double().numpy().T / module.clip.temperature, -np.inf)
    column = np.array([captions.index(caption) for caption in texts])
    image_to_text = -(logits[np.arange(40), column] - np.log(np.exp(logits).sum(1))).mean()
    log_probability = logits - np.log(np.exp(logits).sum(0))
    text_to_image = -np.mean([log_probability[column == m, m].mean() for m in range(len(captions))])
    assert len(captions) < 20, "some captions are shared"
    assert output.loss.loss.item() == pytest.approx((image_to_text + text_to_image) / 2, rel=1e-4)
    assert output.correct == (logits.argmax(1) == column).sum()


def test_a_locked_text_side_by_the_formula() -> None:
    """Images meet the given embeddings, and the text tower is drawn to them, by each caption of the batch."""
    locked_CE = F.normalize(torch.randn(10, 24, generator=torch.Generator().manual_seed(5)), dim=1)
    task = clip_task(training(), locked_CE=locked_CE)
    module = task.module.eval()
    (batch,) = task.data.batches(0, 40, 0, 1, CPU)
    torch.manual_seed(3)
    output = module(batch)
    torch.manual_seed(3)
    drawn = [int(torch.randint(len(templates), ())) for templates in PROMPTS]
    pairs = sorted(set(zip(batch.view_indices.tolist(), batch.labels.tolist(), strict=True)))
    with torch.inference_mode():
        image = module.clip.encode_images(batch.images).double().numpy()
        tokens = module.clip.tokenize([PROMPTS[v][drawn[v]].format(CLASS_NAMES[c]) for v, c in pairs])
        text = module.clip.encode_texts(tokens).double().numpy()
    locked = locked_CE.double().numpy()[[c for _, c in pairs]]
    same_view = batch.view_indices.numpy()[:, None] == [v for v, _ in pairs]
    logits = np.where(same_view, image @ locked.T / module.clip.temperature, -np.inf)
    labels = zip(batch.view_indices.tolist(), batch.labels.tolist(), strict=True)
    column = np.array([pairs.index(pair) for pair in labels])
    image_to_text = -(logits[np.arange(40), column] - np.log(np.exp(logits).sum(1))).mean()
    log_probability = logits - np.log(np.exp(logits).sum(0))
    text_to_image = -np.mean([log_probability[column == m, m].mean() for m in range(len(pairs))])
    contrastive, imitation = (image_to_text + text_to_image) / 2, (1 - (text * locked).sum(1)).mean()
    assert output.loss.terms["contrastive"].item() == pytest.approx(contrastive, rel=1e-4)
    assert output.loss.terms["locked_text"].item() == pytest.approx(imitation, rel=1e-4)
    assert output.loss.loss.item() == pytest.approx(contrastive + imitation, rel=1e-4)


def test_a_locked_text_tower_gives_the_embeddings_it_is_locked_to(tmp_path: Path) -> None:
    config = training(epochs=12, batch_size=8, optimizer="adamw", learning_rate=5e-4, warmup_epochs=1)
    locked_CE = F.normalize(torch.randn(10, 24, generator=torch.Generator().manual_seed(5)), dim=1)
    task = clip_task(config, num_images=400, locked_CE=locked_CE)
    outcome = run(task, config, tmp_path)
    assert outcome.accuracy > 0.3
    folder = str(tmp_path / "saved")
    task.save(folder, outcome.weights)
    bank_VCE = ClipTeacher.load(folder).text_bank(PROMPTS, CLASS_NAMES)
    assert (bank_VCE * locked_CE).sum(dim=2).min() > 0.9


def test_a_new_clip_is_the_same_in_every_process() -> None:
    """Workers build it each by themselves, and a restarted one goes on with another's weights: the numbers of
    its tokens are what the weights speak of."""
    first, second = build_clip(), build_clip()
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    texts = [template.format(name) for templates in PROMPTS for template in templates for name in CLASS_NAMES]
    assert torch.equal(first.tokenize(texts)["input_ids"], second.tokenize(texts)["input_ids"])
    assert_same_weights(first.model.state_dict(), second.model.state_dict())

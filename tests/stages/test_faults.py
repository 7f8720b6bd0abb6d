"""A run is killed, or loses actors, nodes or room on the disk: it, or the next one, ends as if it was not."""

import concurrent.futures
import errno
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from faulty_cluster import SHARDS_IN_HAND, TEACHER, TRAIN, VIEWS, Notes, faulty_cluster
from PIL import Image
from run_processes import committed, descendants, kill_all, started, titled, wait_until

from tmkd_ray.cli import main
from tmkd_ray.knowledge.compute import ShardWriter
from tmkd_ray.models import build_model
from tmkd_ray.types import TaskSpec

pytestmark = pytest.mark.ray

NUM_IMAGES = 800
NUM_SHARDS = 23 + 3
"""Of 720 training and 80 validation images, 32 to each."""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Many small shards by a teacher that needs no training."""
    torch.manual_seed(0)
    checkpoint = tmp_path_factory.mktemp("teacher") / "resnet8.pth"
    torch.save(build_model("resnet8", TaskSpec(tuple("0123456789"), 32)).state_dict(), checkpoint)
    return [
        "dataset=digits",
        f"dataset.limit={NUM_IMAGES}",
        "distiller=kd",
        "teacher.visual.model=resnet8",
        f"teacher.visual.checkpoint={checkpoint}",
        "teacher.text=null",
        "knowledge.num_variants=2",
        "knowledge.shard_rows=32",
        "knowledge.views.max_size=1",
        "knowledge.visual.batch_size=64",
        f"output={tmp_path_factory.mktemp('runs')}",
    ]


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole_store(ray_cluster, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that nothing happened to."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    assert main(["knowledge", *options, f"knowledge.path={store}"]) == 0
    return store


@pytest.fixture(scope="module")
def undisturbed(whole_store: Path) -> dict[str, bytes]:
    """Every file of it."""
    files = contents(whole_store)
    assert len(files) == 2 * NUM_SHARDS + 3
    return files


@pytest.fixture(scope="module")
def scenario() -> Iterator[Callable[..., Any]]:
    """Run a method of `FaultyCluster`."""
    with faulty_cluster() as run:
        yield run


def finish(
    store: Path, options: list[str], undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Run again: what is done stays untouched, the rest is computed, and the store is the undisturbed one."""
    assert not (store / "manifest.json").exists()
    done = {record: record.stat().st_mtime_ns for record in committed(store)}
    assert 0 < len(done) < NUM_SHARDS
    capsys.readouterr()
    assert main(["knowledge", *options, f"knowledge.path={store}"]) == 0
    left, kept = map(int, re.search(r"in (\d+) shards \((\d+) done\)", capsys.readouterr().err).groups())
    assert left + kept == NUM_SHARDS
    assert kept >= len(done)  # more, if a worker of the failed run finished one since
    assert {record: record.stat().st_mtime_ns for record in done} == done
    assert contents(store) == undisturbed


def test_a_killed_driver(
    options: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    arguments = ["knowledge", *options, f"knowledge.path={store}"]
    with started(["-m", "tmkd_ray", *arguments], tmp_path / "log") as run:
        wait_until(lambda: len(committed(store)) > 2, run)
        run.send_signal(signal.SIGSTOP)  # it is alive, but starts no further shard
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert f"error: another run writes the knowledge store at {store}: process {run.pid} on " in said
        assert "Traceback" not in said
        assert (store / "writer.json").exists()
        kill_all(run.pid)
    finish(store, options, undisturbed, capsys)


def test_killed_actors(
    options: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"

    def kill_actors() -> int:
        for title in ("ViewStage", "_VisualActor"):
            before = len(committed(store))
            wait_until(lambda before=before: len(committed(store)) > before + 2)
            (actor,) = titled(descendants(os.getpid()), f"MapBatches({title})")
            actor.kill()
        return len(committed(store))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_actors)
        assert main(["knowledge", *options, f"knowledge.path={store}"]) == 0
        assert killing.result() < NUM_SHARDS
    assert contents(store) == undisturbed


def test_a_node_too_slow(
    scenario: Callable[..., Any], options: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """It does not hold the others: while it has its first shard in hand, they do all but what it was given.

    Two nodes are so slow, one of the views, one of the teacher; the latter is given some more in the end, which
    the former had held.
    """
    store, notes = tmp_path / "store", Notes(tmp_path / "notes")
    answer, slow = scenario("straggler", options, store, notes, NUM_SHARDS)
    assert answer.code == 0, answer.err
    assert contents(store) == undisturbed
    for stage in (VIEWS, TEACHER):
        shares = Counter(work.node in slow for work in notes.read(stage))
        print(f"{stage}: the slow node did {shares[True]} of {NUM_SHARDS} shards, the other {shares[False]}")
        assert shares.total() == NUM_SHARDS, "each once"
        held = SHARDS_IN_HAND if stage == VIEWS else 2 * SHARDS_IN_HAND
        assert 1 <= shares[True] <= held


def test_a_lost_cpu_node_and_a_lost_gpu_node(
    scenario: Callable[..., Any], options: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """One of the views, one of the teacher, each with a shard in hand."""
    store, notes = tmp_path / "store", Notes(tmp_path / "notes")
    answer, lost = scenario("lost_nodes", options, store, notes)
    assert answer.code == 0, answer.err
    assert contents(store) == undisturbed
    # Counted as they come: one that came twice would make it more.
    assert re.findall(r"knowledge: ([\d,]+)/", answer.err)[-1] == f"{NUM_IMAGES:,}"
    assert [node.kind for node in lost] == [VIEWS, TEACHER]
    done = {(path.parent.name, int(path.stem)): path.stat().st_mtime for path in committed(store)}
    assert len(done) == NUM_SHARDS
    for node in lost:
        before = sum(time < node.time for time in done.values())
        works = notes.read(node.kind)
        times = {piece: [work.time for work in works if work.piece == piece] for piece in done}
        again = {piece for piece, times in times.items() if len(times) > 1}
        (*_, in_hand) = [work.piece for work in works if work.node == node.node]
        assert 1 < before < NUM_SHARDS
        assert in_hand in again
        finished = [piece for piece in again if max(times[piece]) > done[piece]]
        assert len(finished) <= 1, "one was perhaps just written on the node, and could not be told of"
        print(
            f"lost a node of the {node.kind} after {before} of {NUM_SHARDS} shards: the shard in hand was done "
            f"{done[in_hand] - node.time:.1f} s later, {len(again)} were done again"
        )


EPOCHS, STEPS, CHECKPOINT_STEPS = 3, 720 // 64, 4
LOST_AT = (1, 6)
"""Epoch and step, from 0: two steps after a checkpoint."""


def test_a_lost_training_node(
    scenario: Callable[..., Any], whole_store: Path, options: list[str], tmp_path: Path
) -> None:
    """The node of one of two workers; the training ends in the weights of one that lost none."""
    notes = Notes(tmp_path / "notes")
    options = [
        *options,
        f"knowledge.path={whole_store}",
        *(
            "student.model=resnet8",
            "training.batch_size=64",
            "training.num_workers=2",
            "training.use_gpu=false",
        ),
        *(
            "training.loggers=none",
            f"training.epochs={EPOCHS}",
            f"training.checkpoint_every_steps={CHECKPOINT_STEPS}",
        ),
    ]
    runs = {name: [*options, f"output={tmp_path / name}"] for name in ("whole", "lost")}
    whole = scenario("train", runs["whole"])
    assert whole.code == 0, whole.err
    answer, lost = scenario("lost_training_node", runs["lost"], notes, LOST_AT, tmp_path / "flag")
    assert answer.code == 0, answer.err
    weights = {run: next((tmp_path / run).rglob("model.safetensors")).read_bytes() for run in runs}
    assert weights["lost"] == weights["whole"], "to the bit"
    assert "resuming after epoch 1, step 4 of the next" in answer.err
    for rank in (0, 1):
        works = [work for work in notes.read(TRAIN) if work.rank == rank]
        steps = Counter(work.piece for work in works)
        assert set(steps) == {(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)}
        again = {step for step, times in steps.items() if times > 1}
        assert again == {(LOST_AT[0], step) for step in range(4, LOST_AT[1] + 1)}
        assert len(again) <= CHECKPOINT_STEPS
    (resumed, *_) = [work.time for work in notes.read(TRAIN) if work.time > lost.time]
    print(
        f"lost a training node: the training went on {resumed - lost.time:.1f} s later, "
        f"{len(again)} steps were done again"
    )
    assert lost.node not in {work.node for work in notes.read(TRAIN) if work.time > lost.time}

    answer, nodes = scenario("evaluate", runs["lost"], notes)
    assert answer.code == 0, answer.err
    used = {work.node for work in notes.read("evaluation")}
    assert used, "it was noted"
    assert used <= nodes, "on the nodes that train"


class _FullDisk(ShardWriter):
    """Finds no room for one shard."""

    def __call__(self, table: pa.Table) -> pa.Table:
        if table.column("number")[0].as_py() != 20:
            return super().__call__(table)
        os_fsync = os.fsync
        os.fsync = _no_room
        try:
            return super().__call__(table)
        finally:
            os.fsync = os_fsync


def _no_room(file: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(
    ray_cluster,
    options: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    with monkeypatch.context() as patch:
        patch.setattr("tmkd_ray.stages.knowledge.ShardWriter", _FullDisk)
        assert main(["knowledge", *options, f"knowledge.path={store}"]) == 2
    said = capsys.readouterr().err
    assert re.search(
        rf"error: cannot write {store}/train/00020-\w+\.parquet: No space left on device, [\d,]+ MB free\. "
        "Make room and start again; what is finished is kept\n",
        said,
    )
    assert "Traceback" not in said
    finish(store, options, undisturbed, capsys)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Dark noise, and one white image."""
    generator = np.random.default_rng(0)
    for split, name in [(split, name) for split in ("train", "test") for name in ("cat", "dog")]:
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 40, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "images" / "train" / "dog" / "white.png")
    return tmp_path / "images"


def test_a_teacher_that_returns_nan_for_one_image(
    ray_cluster, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model("resnet8", TaskSpec(("cat", "dog"), 32))
    with torch.no_grad():
        # The sum over 27 inputs passes 3.4e38 where all of them are 1, and is far below where they are dark.
        model.conv1.weight.fill_(1.4e37)
        model.bn1.weight.zero_()  # 0 · finite = 0, 0 · ∞ = NaN
    torch.save(model.state_dict(), tmp_path / "overflows.pth")
    options = [
        "dataset=image_folder",
        f"dataset.path={images}",
        "dataset.validation_fraction=0.3",
        "views={original: {}}",
        "distiller=kd",
        "teacher.text=null",
        "teacher.visual.model=resnet8",
        f"teacher.visual.checkpoint={tmp_path / 'overflows.pth'}",
        "teacher.visual.mean=[0, 0, 0]",
        "teacher.visual.std=[1, 1, 1]",
        "knowledge.num_variants=2",
        "knowledge.shard_rows=4",
        f"output={tmp_path}",
    ]
    assert main(["knowledge", *options]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"error: the visual teacher \(teacher\.visual\) returned NaN or infinite values for the image "
        r"train/dog/white\.png \(view original, variant \d\)",
        said,
    )
    assert "Traceback" not in said

"""A cluster of several nodes on this machine, on which commands run while nodes are slow or lost.

What the stages' actors and the training workers do is noted in a file, by node; those of one node are made to
hold what they have in hand: until the others have done all the rest, or until their node is lost.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import run_processes
from ray._private.node import Node
from ray.cluster_utils import Cluster
from run_processes import OURS_ALONE, Answer, committed, process_that_answers, run_command, wait_until

from tmkd_ray.stages import distillation, evaluation, knowledge, pipeline
from tmkd_ray.stages.training import TrainingJob, run_jobs
from tmkd_ray.training.loop import TrainTask

VIEWS, TEACHER, TRAIN = "views", "teacher", "train"
"""Kinds of nodes, by their marks."""

RESOURCES: dict[str, dict[str, Any]] = {
    VIEWS: {"num_cpus": 0},
    TEACHER: {"num_cpus": 0, "num_gpus": 1},
    TRAIN: {"num_cpus": 1},
}

MARKED = [
    "cluster.node_marks=true",
    *("knowledge.views.num_cpus=0", "knowledge.views.min_size=2", "knowledge.views.max_size=2"),
    *("knowledge.visual.num_cpus=0", "knowledge.visual.min_size=2", "knowledge.visual.max_size=2"),
    "knowledge.visual.num_gpus=0.5",  # the node that is left has room for both actors
]
"""Overrides with which each stage goes to its kind of nodes, two actors each."""

SHARDS_IN_HAND = 2
"""Shards that an actor is given at once: one that it works on, one that waits."""


@dataclass(frozen=True)
class Work:
    """A line of the notes.

    Attributes:
        stage: `views`, `teacher`, `evaluation`, or `train`.
        piece: (split, number) of a shard or chunk, (epoch, step) of a training.
        node: where; rank: of the training worker.
        time: of the beginning.
    """

    stage: str
    piece: tuple[Any, Any]
    node: str
    time: float
    rank: int = 0


class Notes:
    """A file that processes on this machine append to."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def add(self, work: Work) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(dataclasses.asdict(work)) + "\n")

    def read(self, stage: str | None = None, node: str | None = None) -> list[Work]:
        """Return what was noted so far, of one stage or node."""
        if not os.path.exists(self.path):
            return []
        with open(self.path) as file:
            fields = [json.loads(line) for line in file if line.endswith("\n")]
        found = [Work(**{**each, "piece": tuple(each["piece"])}) for each in fields]
        return [each for each in found if stage in (None, each.stage) and node in (None, each.node)]


Hold = Callable[[int, str], None]
"""Told, before a piece is worked on, how many the actor was given so far, and on which node it is."""


def noted(kind: type, stage: str, notes: Notes, hold: Hold = lambda given, node: None) -> type:
    """Return an actor class that works as another does, but notes it, and may be held."""
    module, name = (
        kind.__module__,
        kind.__name__,
    )  # to a worker it goes by name: here the name is to mean this one

    class Noted:
        def __init__(self, *arguments: Any) -> None:
            self.actor = getattr(importlib.import_module(module), name)(*arguments)
            self.given = 0

        def __call__(self, table: Any) -> Any:
            node = ray.get_runtime_context().get_node_id()
            piece = (table.column("split")[0].as_py(), table.column("number")[0].as_py())
            notes.add(Work(stage, piece, node, time.time()))
            self.given += 1
            hold(self.given, node)
            return self.actor(table)

    Noted.__name__ = name
    return Noted


def straggling(stage: str, slow: str, notes: Notes, store: Path, others: int) -> Hold:
    """Let the slow node's actor finish nothing until so many shards are done, all by others."""

    def hold(given: int, node: str) -> None:
        if node == slow:
            wait_until(lambda: len(committed(store)) >= others)
        elif given == 1:  # the slow one too is to be given something
            wait_until(lambda: bool(notes.read(stage, slow)))

    return hold


def doomed(stage: str, node: str, notes: Notes, after: int) -> Hold:
    """Let the node's actor hold a shard until the node is lost, when it has done some."""

    def hold(given: int, here: str) -> None:
        if here == node and given > after:
            time.sleep(600)
        elif given > after:  # else all could be done before
            wait_until(lambda: len(notes.read(stage, node)) > after)

    return hold


def noted_training(
    build: Callable[[Any], TrainTask], notes: Notes, lost_at: tuple[int, int], flag: Path
) -> Callable[[Any], TrainTask]:
    """Return the builder of a task that notes its steps; once, the second worker stops at one for good."""

    def built(device: Any) -> TrainTask:
        task = build(device)
        batches = task.batches

        def noted_batches(epoch: int, context: Any, first_step: int = 0) -> Iterator[Any]:
            for step, batch in enumerate(batches(epoch, context, first_step), first_step):
                node = ray.get_runtime_context().get_node_id()
                notes.add(Work(TRAIN, (epoch, step), node, time.time(), context.rank))
                if (epoch, step) == lost_at and context.rank == 1 and not flag.exists():
                    flag.write_text(node)
                    time.sleep(600)
                yield batch

        task.batches = noted_batches  # type: ignore[method-assign]
        return task

    return built


@dataclass(frozen=True)
class Lost:
    """A node that was lost; time: when."""

    kind: str
    node: str
    time: float


class FaultyCluster:
    """The cluster, in the process that runs the commands; its head alone has CPUs for the tasks that write."""

    def __init__(self) -> None:
        for module in (sys.modules[__name__], run_processes):
            ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import them
        impatient = {
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 2000,
            "health_check_failure_threshold": 3,
        }
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": impatient}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, list[Node]] = {kind: [] for kind in RESOURCES}
        ray.init(address=self.cluster.address, logging_level="error", log_to_driver=False)
        pipeline._device = lambda gpus: "cpu"  # the nodes' GPUs are made up

    def __call__(self, scenario: str, *arguments: Any) -> Any:
        return getattr(self, scenario)(*arguments)

    def need(self, kind: str, count: int) -> list[str]:
        """Return the ids of the nodes of a kind; new ones are started if there are fewer."""
        while len(self.nodes[kind]) < count:
            resources = {f"tmkd_{kind}": 1}
            self.nodes[kind].append(self.cluster.add_node(resources=resources, **RESOURCES[kind]))
        return [node.node_id for node in self.nodes[kind]]

    def lose(self, node_id: str) -> Lost:
        """Kill all processes of a node."""
        ((kind, node),) = [
            (kind, node) for kind, nodes in self.nodes.items() for node in nodes if node.node_id == node_id
        ]
        self.nodes[kind].remove(node)
        lost = Lost(kind, node_id, time.time())
        self.cluster.remove_node(node, allow_graceful=False)
        return lost

    def straggler(
        self, options: list[str], store: Path, notes: Notes, num_shards: int
    ) -> tuple[Answer, set[str]]:
        """Compute a store while a node of each kind is slow beyond measure; return those nodes too."""
        slow = {kind: self.need(kind, 2)[0] for kind in (VIEWS, TEACHER)}
        others = num_shards - len(slow) * SHARDS_IN_HAND
        holds = {kind: straggling(kind, node, notes, store, others) for kind, node in slow.items()}
        return self._knowledge(options, store, notes, holds), set(slow.values())

    def lost_nodes(self, options: list[str], store: Path, notes: Notes) -> tuple[Answer, list[Lost]]:
        """Compute a store while a node of each kind is lost, first one of the views."""
        after = {VIEWS: 2, TEACHER: 5}
        nodes = {kind: self.need(kind, 2)[0] for kind in after}
        holds = {kind: doomed(kind, nodes[kind], notes, after[kind]) for kind in after}
        lost: list[Lost] = []

        def lose_nodes() -> None:
            for kind, node in nodes.items():
                wait_until(lambda kind=kind, node=node: len(notes.read(kind, node)) > after[kind])
                wait_until(lambda: len(committed(store)) > 1)
                lost.append(self.lose(node))

        with _meanwhile(lose_nodes):
            answer = self._knowledge(options, store, notes, holds)
        return answer, lost

    def _knowledge(self, options: list[str], store: Path, notes: Notes, holds: dict[str, Hold]) -> Answer:
        views = noted(knowledge.ViewStage, VIEWS, notes, holds[VIEWS])
        teacher = noted(pipeline._VisualActor, TEACHER, notes, holds[TEACHER])
        with (
            mock.patch.object(knowledge, "ViewStage", views),
            mock.patch.object(pipeline, "_VisualActor", teacher),
        ):
            return run_command("knowledge", *options, *MARKED, f"knowledge.path={store}")

    def train(self, options: list[str]) -> Answer:
        """Train students, undisturbed."""
        self.need(TRAIN, 3)
        return run_command("distill", *options, *MARKED)

    def lost_training_node(
        self, options: list[str], notes: Notes, lost_at: tuple[int, int], flag: Path
    ) -> tuple[Answer, Lost]:
        """Train students; the node of the second of two workers is lost at a step."""
        self.need(TRAIN, 3)
        lost: list[Lost] = []

        def lose_node() -> None:
            wait_until(lambda: flag.exists() and bool(flag.read_text()))
            lost.append(self.lose(flag.read_text()))

        def run_noted(jobs: list[TrainingJob], folder: str) -> Any:
            changed = [
                dataclasses.replace(job, build=noted_training(job.build, notes, lost_at, flag)) for job in jobs
            ]
            return run_jobs(changed, folder)

        with mock.patch.object(distillation, "run_jobs", run_noted), _meanwhile(lose_node):
            answer = run_command("distill", *options, *MARKED)
        return answer, lost[0]

    def evaluate(self, options: list[str], notes: Notes) -> tuple[Answer, set[str]]:
        """Evaluate what is trained; return the nodes that are for training too."""
        nodes = self.need(TRAIN, 2)
        with mock.patch.object(
            evaluation, "ChunkEvaluator", noted(evaluation.ChunkEvaluator, "evaluation", notes)
        ):
            return run_command("evaluate", *options, *MARKED), set(nodes)


@contextlib.contextmanager
def _meanwhile(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(timeout=10)


@contextlib.contextmanager
def faulty_cluster() -> Iterator[Callable[..., Any]]:
    """Start one; yield what runs its methods by their names. All that it started ends with the block."""
    with contextlib.ExitStack() as stack:
        with mock.patch.dict(os.environ, OURS_ALONE):
            scenario = stack.enter_context(process_that_answers(FaultyCluster))
        yield scenario

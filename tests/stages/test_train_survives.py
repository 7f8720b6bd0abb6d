"""Training under a real Ray: what ends a worker or the driver costs no more than a checkpoint interval."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import StepOutput, TrainTask, train
from tmkd_ray.types import LossOutput

pytestmark = pytest.mark.ray

STEPS = 4


class Points:
    def __init__(self, inputs, targets):
        self.inputs, self.labels = inputs, targets


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.fit = nn.Linear(3, 1)

    def forward(self, batch):
        loss = (self.fit(batch.inputs) - batch.labels).square().mean()
        return StepOutput(LossOutput(loss, {"square": loss}))


class LineTask(TrainTask):
    """A linear regression on points that are a function of (epoch, step); `before_step` is told of each."""

    def __init__(self, before_step=lambda epoch, step, context: None):
        torch.manual_seed(0)
        self.module = Line()
        self.num_samples = 8 * STEPS
        self.before_step = before_step

    def batches(self, epoch, context, first_step=0):
        for step in range(first_step, STEPS):
            self.before_step(epoch, step, context)
            generator = torch.Generator().manual_seed(100 * epoch + step)
            inputs = torch.randn(8, 3, generator=generator)
            local = 8 // context.world_size
            inputs = inputs[context.rank * local : (context.rank + 1) * local]
            yield Points(inputs, inputs.sum(1, keepdim=True))

    def validate(self, context):
        return {"accuracy": 1 / (1 + self.module.fit.weight.detach().sub(1).abs().sum().item())}

    @property
    def kept(self):
        return self.module


def config(**changes):
    fields = {"epochs": 4, "batch_size": 8, "learning_rate": 0.05, "num_workers": 1, "ema_decay": 0.9}
    return TrainingConfig.model_validate(
        {**fields, "checkpoint_every_steps": 1, "loggers": "none", "max_failures": 1, **changes}
    )


@pytest.fixture
def start(ray_cluster, tmp_path):
    """Train `build(device)`, return the outcome; the weights lie in `tmp_path / "job"`."""
    from tmkd_ray.stages.training import TrainingJob, run_jobs

    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

    def run(build, **changes):
        job = TrainingJob("k", "line", str(tmp_path / "job"), config(**changes), build)
        (outcome,) = run_jobs([job], str(tmp_path))
        return outcome

    return run


def undisturbed(folder, **changes):
    """Return the weights and losses of the same training in this very process."""
    outcome = train(LineTask(), config(**changes), PlainContext(folder, quiet=True), "k", "line")
    return outcome.weights, [record.loss for record in outcome.history]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_as_undisturbed(outcome, tmp_path, **changes):
    weights, losses = undisturbed(tmp_path / "plain", **changes)
    assert [record.loss for record in outcome.history] == losses
    for name, value in weights_of(tmp_path / "job").items():
        assert torch.equal(value, weights[name])


def test_killed_and_damaged(start, tmp_path, capsys):
    """The worker is killed within an epoch; the checkpoint it wrote last is damaged by then."""
    flag = tmp_path / "died"

    def die(epoch, step, context):
        if (epoch, step) == (1, 3) and not flag.exists():
            flag.touch()
            newest = Path(storage.join(context.folder, context._names()[0]))
            content = bytearray((newest / "tensors.pt").read_bytes())
            content[-100] ^= 1
            (newest / "tensors.pt").write_bytes(bytes(content))
            os.kill(os.getpid(), signal.SIGKILL)

    outcome = start(lambda device: LineTask(die))
    said = capsys.readouterr().err
    assert "checkpoint checkpoint_00000006: tensors.pt is not what was written" in said
    assert "line: resuming after epoch 1, step 2 of the next" in said
    assert_as_undisturbed(outcome, tmp_path)
    kept = [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith("checkpoint_0")]
    assert len(kept) <= 3, "two, and the damaged one, which Ray forgot"


def test_a_warning_makes_a_checkpoint(start, tmp_path, capsys):
    """Ray says that a node is being drained: a checkpoint at once, and the training goes on."""

    def build(device):
        import ray.train

        calls = []

        def info():
            calls.append(1)
            return types.SimpleNamespace(preempted_node_ids=["n"]) if len(calls) > 2 else None

        ray.train.get_preemption_info = info
        import tmkd_ray.training.loop

        tmkd_ray.training.loop._MAX_STEPS_UNSEEN = 1
        return LineTask()

    outcome = start(build, checkpoint_every_steps=None, checkpoint_every=4)
    said = capsys.readouterr().err
    assert said.count("line: warned of an end; checkpoint after epoch 0, step 3 of the next") == 1
    assert said.count("warned of an end") == 1, "once for each node"
    assert_as_undisturbed(outcome, tmp_path)
    checkpoints = [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith("checkpoint_0")]
    assert len(checkpoints) == 2, "that one and the last"


@pytest.mark.parametrize("where", ["build", "step"])
def test_a_defect_fails_at_once(where, start, tmp_path):
    """With its traceback, and after one try, though three restarts are allowed."""
    from tmkd_ray.stages.training import DefectError

    tries = tmp_path / "tries"

    def note(*_):
        with tries.open("a") as file:
            file.write("x")
        raise TypeError("a mistake in the code")

    def build(device):
        if where == "build":
            note()
        return LineTask(note)

    with pytest.raises(DefectError, match=r"(?s)Traceback.*TypeError: a mistake in the code"):
        start(build, max_failures=3)
    assert tries.read_text() == "x"


def test_fewer_workers_than_wanted(start, tmp_path, capsys):
    """Two are wanted, but there is room for one of three CPUs; the batch stays the same."""
    outcome = start(lambda device: LineTask(), num_workers=2, min_workers=1, num_cpus_per_worker=3)
    assert "1 workers (cpu) ready" in capsys.readouterr().err
    assert outcome.num_workers == 1
    assert_as_undisturbed(outcome, tmp_path)


def test_what_is_a_defect():
    import ray.exceptions
    import torch.distributed as dist

    from tmkd_ray.stages.training import is_defect

    ours = [TypeError("x"), KeyError("x"), AssertionError(), RuntimeError("shapes cannot be multiplied")]
    others = [
        OSError("disk"),
        ConnectionResetError(),
        dist.DistNetworkError("x"),
        ray.exceptions.ActorDiedError(),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"),
    ]
    assert [is_defect(error, resumable=False) for error in ours] == [True] * len(ours)
    assert not any(is_defect(error, resumable=True) for error in ours)
    assert not any(is_defect(error, resumable=False) for error in others)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"checkpoint_results": [',
        '{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_00000007"}]}',
    ],
)
def test_a_broken_list_of_checkpoints_is_left_out(content, tmp_path, capsys):
    from tmkd_ray.stages.training import _SNAPSHOT, _drop_broken_snapshot

    (tmp_path / _SNAPSHOT).write_text(content)
    (tmp_path / "checkpoint_00000006").mkdir()
    _drop_broken_snapshot(str(tmp_path))
    assert not (tmp_path / _SNAPSHOT).exists()
    assert "found without it" in capsys.readouterr().err


def test_a_whole_list_of_checkpoints_is_kept(tmp_path, capsys):
    from tmkd_ray.stages.training import _SNAPSHOT, _drop_broken_snapshot

    (tmp_path / _SNAPSHOT).write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "a"}]}))
    (tmp_path / "a").mkdir()
    _drop_broken_snapshot(str(tmp_path))
    assert (tmp_path / _SNAPSHOT).exists()
    _drop_broken_snapshot(str(tmp_path / "nothing"))
    assert capsys.readouterr().err == ""


def descendants(pid):
    """Return the ids of the processes that a process started, and those that they started."""
    children = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in listing.read_text().split()]
    return children + [one for child in children for one in descendants(child)]


def end(processes, patience_s=20):
    """Wait until these processes have ended, as Ray's do without their driver; then end those that have not."""
    limit = time.monotonic() + patience_s
    while any(runs(pid) for pid in processes) and time.monotonic() < limit:
        time.sleep(0.1)
    for pid in processes:
        if runs(pid):
            os.kill(pid, signal.SIGKILL)


def runs(pid):
    """Return whether a process has not ended; one that nobody asked how has."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


DRIVER = """
import sys, time
from tmkd_ray.stages.session import start_local_ray
from tmkd_ray.stages.training import TrainingJob, run_jobs
import ray
sys.path.insert(0, sys.argv[1])
import test_train_survives as tests
ray.cloudpickle.register_pickle_by_value(tests)
start_local_ray(num_cpus=4)
slow = float(sys.argv[3])
task = lambda device: tests.LineTask(lambda epoch, step, context: time.sleep(slow))
run_jobs([TrainingJob("k", "line", sys.argv[2] + "/job", tests.config(), task)], sys.argv[2])
ray.shutdown()
"""


@pytest.mark.timeout(200)
def test_the_driver_killed_and_started_again(tmp_path):
    """With all its Ray; the list of checkpoints half-written. The same command goes on to the same end."""
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def command(slow):
        return [sys.executable, "-c", DRIVER, tests, str(tmp_path), str(slow)]

    first = subprocess.Popen(
        command(0.5), env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    third = tmp_path / "checkpoints" / "checkpoint_00000003"
    try:
        while not third.exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
    finally:
        family = descendants(first.pid)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        first.stderr.close()
        end(family)
    assert not (tmp_path / "job" / "outcome.json").exists()
    snapshot = tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:40])

    second = subprocess.run(
        command(0), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert second.returncode == 0, second.stderr
    assert "line: resuming after epoch" in second.stderr
    outcome = json.loads((tmp_path / "job" / "outcome.json").read_text())
    assert_as_undisturbed(
        types.SimpleNamespace(history=[types.SimpleNamespace(**r) for r in outcome["history"]]), tmp_path
    )

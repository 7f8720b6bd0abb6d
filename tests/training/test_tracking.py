"""What the loggers are told, and where it lies."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_samples import InterruptedContext, InterruptedTrainingError, ScriptedTask, scripted

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.results import EpochRecord
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import train
from tmkd_ray.training.tracking import open_loggers, scalars

RECORD = EpochRecord(
    epoch=3,
    learning_rate=0.1,
    loss=1.5,
    terms={"ce": 0.5, "kd": None},
    validation_accuracy=0.75,
    seconds=2.0,
    images_per_second=40.0,
    data_seconds=0.5,
    data_share=0.25,
)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_scalars_leave_out_what_is_not_known() -> None:
    assert scalars(RECORD) == {
        "loss": 1.5,
        "terms/ce": 0.5,
        "learning_rate": 0.1,
        "accuracy/validation": 0.75,
        "speed/images_per_second": 40.0,
        "speed/data_share": 0.25,
        "speed/seconds": 2.0,
    }


def test_tensorboard(tmp_path: Path) -> None:
    """Each epoch once, though one was trained twice."""
    config = scripted(epochs=4)
    accuracies = [0.1, 0.2, 0.3, 0.4]
    context = InterruptedContext(tmp_path / "checkpoints", epoch=3, stored=False)
    with pytest.raises(InterruptedTrainingError):
        train(ScriptedTask(accuracies), config, context, "run", "test", str(tmp_path))
    context_2 = PlainContext(tmp_path / "checkpoints", quiet=True)
    history = train(ScriptedTask(accuracies), config, context_2, "run", "test", str(tmp_path)).history
    found = read(tmp_path / "tensorboard")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert [value for _, value in found["accuracy/validation"]] == pytest.approx(accuracies)
    assert [value for _, value in found["terms/slope"]] == pytest.approx([r.terms["slope"] for r in history])
    # A finished run is not logged again.
    files = list((tmp_path / "tensorboard").iterdir())
    train(ScriptedTask([]), config, context_2, "run", "test", str(tmp_path))
    assert list((tmp_path / "tensorboard").iterdir()) == files


def test_tensorboard_behind_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was logged is there from each checkpoint on."""
    uri = f"file://{tmp_path}/job"
    (logger,) = open_loggers(scripted(), uri, "key", "test", 0)
    logger.log(RECORD)
    logger.save()
    assert read(tmp_path / "job" / "tensorboard")["loss"] == [(3, 1.5)]
    logger.log(RECORD.model_copy(update={"epoch": 4}))
    logger.close()
    assert [step for step, _ in read(tmp_path / "job" / "tensorboard")["loss"]] == [3, 4]
    assert len(storage.list_names(f"{uri}/tensorboard")) == 1


def test_no_logger_no_files(tmp_path: Path) -> None:
    config = scripted(epochs=1, loggers=[])
    train(ScriptedTask([0.5]), config, PlainContext(tmp_path / "c", quiet=True), "run", "test", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = scripted(epochs=1, loggers=[name])
    task = ScriptedTask([0.5])
    with pytest.raises(UserError, match=rf"install tmkd-ray\[{name}\]"):
        train(task, config, PlainContext(tmp_path, quiet=True), "run", "test", str(tmp_path))
    assert task.seen == [], "before anything is trained"


class Calls(types.ModuleType):
    """Stands in for a package that is not installed: it writes down how it is called."""

    def __init__(self, name: str, results: dict[str, Any]) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.results = results

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            return self.results.get(name)

        return call


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the calls of its documentation: start_run, log_params, log_metrics, end_run."""
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="the-run"))
    mlflow = Calls("mlflow", {"start_run": run})
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    config = scripted(epochs=2, loggers=["mlflow"])
    for _ in range(2):
        (logger,) = open_loggers(config, str(tmp_path), "key", "a label", 0)
        logger.log(RECORD)
        logger.close()
    names = [name for name, _, _ in mlflow.calls]
    assert names == ["start_run", "log_params", "log_metrics", "end_run", "start_run", "log_metrics", "end_run"]
    assert mlflow.calls[0][2] == {"run_id": None, "run_name": "a label"}
    assert mlflow.calls[4][2] == {"run_id": "the-run", "run_name": "a label"}
    assert mlflow.calls[2][1:] == ((scalars(RECORD),), {"step": 3})
    assert mlflow.calls[1][1][0]["learning_rate"] == 1.0


def test_wandb_resumes_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Calls("run", {})
    wandb = Calls("wandb", {"init": run})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    (logger,) = open_loggers(scripted(loggers=["wandb"]), str(tmp_path), "key", "a label", 0)
    logger.log(RECORD)
    logger.close()
    ((_, _, options),) = wandb.calls
    assert options["id"] == "key"
    assert (options["resume"], options["name"], options["project"]) == ("allow", "a label", "tmkd-ray")
    assert run.calls == [("log", (scalars(RECORD),), {"step": 3}), ("finish", (), {})]

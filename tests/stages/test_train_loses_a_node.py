"""A node of the training is lost: the rest goes on from the last checkpoint, to the same weights."""

import json
import re
from pathlib import Path

import pytest
from run_processes import started
from safetensors.torch import load_file
from test_train_survives import LineTask, config

from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


def test_a_lost_training_node(tmp_path: Path) -> None:
    script = Path(__file__).with_name("lose_a_trainer.py")
    with started([str(script), str(tmp_path)], tmp_path / "log") as run:
        assert run.wait() == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    print(re.search(r"finished [\d.]+ s after a training node was lost", said).group())
    resumed = re.findall(r"line: resuming after epoch (\d+), step (\d+)", said)
    assert len(resumed) == 1, said
    # A checkpoint every step: what was done before the loss is not done again, but for one step.
    epoch, step = map(int, resumed[0])
    assert 4 * epoch + step >= 5
    # In one process, on all of the batch: the same to rounding, for two workers sum in another order.
    whole = train(LineTask(), config(), PlainContext(tmp_path / "plain", quiet=True), "k", "line")
    outcome = json.loads((tmp_path / "job" / "outcome.json").read_text())
    losses = [record["loss"] for record in outcome["history"]]
    assert losses == pytest.approx([record.loss for record in whole.history], rel=1e-5)
    for name, value in load_file(tmp_path / "job" / "model.safetensors").items():
        assert value.numpy() == pytest.approx(whole.weights[name].numpy(), rel=1e-5, abs=1e-6)

"""Every pipeline script is its command: the same code, whichever way it is started."""

import runpy
import sys
from pathlib import Path

import pytest

import tmkd_ray.cli
from tmkd_ray.commands import COMMANDS

SCRIPTS = sorted((Path(__file__).parents[1] / "pipelines").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_passes_its_arguments_to_its_command(script, monkeypatch):
    seen = []

    def main(arguments):
        seen.append(arguments)
        return 7

    monkeypatch.setattr(tmkd_ray.cli, "main", main)
    monkeypatch.setattr(sys, "argv", [str(script), "--config", "a.yaml", "training.epochs=3"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_.value.code == 7
    command = script.stem.replace("_", "-")
    assert seen == [[command, "--config", "a.yaml", "training.epochs=3"]]


def test_every_command_that_computes_has_a_script():
    computing = {name for name in COMMANDS if COMMANDS.get(name).computes}
    assert computing >= {"run", "knowledge", "distill", "evaluate"}
    assert {path.stem.replace("_", "-") for path in SCRIPTS} == computing

"""Run a benchmark's script, or import a module of their folder."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a benchmark; return the JSON objects that its last lines are."""
    command = [sys.executable, str(FOLDER / script), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=280)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            raise
    assert process.returncode == 0, stderr
    results = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    last = stdout.splitlines()[-len(results) :]
    assert results == [json.loads(line) for line in last], "the JSON lines come last"
    return results


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Import a module of the benchmarks' folder, which is no package."""
    monkeypatch.syspath_prepend(str(FOLDER))  # where a script finds its neighbours
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module

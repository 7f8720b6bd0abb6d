"""Run a benchmark's script, or import a module of their folder."""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a benchmark in a process of its own; return the JSON objects that its last lines are."""
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
    return results_in(stdout)


def run_here(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The same in this process, which has imported what takes seconds already; for those without a Ray."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.syspath_prepend(str(FOLDER))  # where a script finds its neighbours
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    return results_in(out.getvalue())


def results_in(stdout: str) -> list[dict[str, Any]]:
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

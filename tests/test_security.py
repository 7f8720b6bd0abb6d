"""A sweep through the code, and hostile files: nothing they hold is run, nothing leaves its folder."""

import ast
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tmkd_ray
from tmkd_ray.cli import main
from tmkd_ray.errors import UserError

PACKAGE = Path(tmkd_ray.__file__).parent
ROOT = PACKAGE.parent

PICKLES_WITHIN_THE_CLUSTER = {"stages/chunks.py", "stages/evaluation.py"}
"""Between this program's own processes, by Ray's object store."""


def calls(folder: Path = PACKAGE) -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in the code: its place, the function's dotted name, and the call."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield str(file.relative_to(folder)), ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


def test_the_sweep_sees_what_it_looks_for():
    names = {name for _, name, _ in calls()}
    assert {"torch.load", "yaml.load", "ray.init", "np.load"} <= names


@pytest.mark.parametrize(
    "folder", [PACKAGE, ROOT / "benchmarks", ROOT / "pipelines"], ids=lambda path: path.name
)
def test_nothing_that_runs_what_it_reads(folder):
    found = []
    for place, name, call in calls(folder):
        given = keywords(call)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{place}:{call.lineno}: torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(f"{place}:{call.lineno}: np.load with pickles")
        if name == "yaml.load" and given.get("Loader") != "_Loader":
            found.append(f"{place}:{call.lineno}: yaml.load by another loader than config_reading's safe one")
        if name in (
            "yaml.unsafe_load",
            "yaml.full_load",
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "joblib.load",
        ):
            found.append(f"{place}:{call.lineno}: {name}")
        if name in ("pickle.load", "pickle.loads") and place not in PICKLES_WITHIN_THE_CLUSTER:
            found.append(f"{place}:{call.lineno}: {name}")
        if given.get("trust_remote_code", "False") != "False" or given.get("shell", "False") != "False":
            found.append(f"{place}:{call.lineno}: {name} with trust_remote_code or a shell")
        if name.endswith((".extractall", ".unpack_archive")):
            found.append(f"{place}:{call.lineno}: {name} may write outside its folder")
    assert found == []


def test_the_yaml_loader_is_a_safe_one():
    import yaml

    from tmkd_ray import config_reading

    assert issubclass(config_reading._Loader, yaml.SafeLoader)


def test_no_ray_is_started_that_listens_or_shows_a_dashboard():
    """One call joins a cluster that is there; the other starts one, on loopback and without a dashboard."""
    starts = [keywords(call) for _, name, call in calls() if name == "ray.init"]
    local = [given for given in starts if given.get("address") == "'local'"]
    assert local
    assert all(given.get("include_dashboard") == "False" for given in local)
    assert all("address" in given for given in starts)
    assert not [given for given in starts if "dashboard_host" in given]


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def hostile(tmp_path) -> tuple[Hostile, Path]:
    return Hostile(tmp_path / "it ran"), tmp_path / "it ran"


@pytest.mark.parametrize("file_format", ["torch", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused(hostile, tmp_path, file_format):
    from tmkd_ray.models import build_model, load_checkpoint
    from tmkd_ray.types import TaskSpec

    bomb, sign = hostile
    path = tmp_path / "weights.pth"
    if file_format == "torch":
        torch.save({"state_dict": bomb}, path)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match=r"weights\.pth"):
        load_checkpoint(build_model("resnet8", TaskSpec(("a", "b"), 32)), str(path))
    assert not sign.exists()


def test_a_training_checkpoint_that_would_run_code_is_refused(hostile, tmp_path):
    """Even one whose checksums are right."""
    from tmkd_ray.training import checkpoint

    bomb, sign = hostile
    with checkpoint.written_checkpoint(checkpoint.TrainingState(key="k"), {}) as written:
        folder = shutil.copytree(written, tmp_path / "checkpoint")
    assert checkpoint.read_checkpoint(folder, "k") is not None
    torch.save({"module": bomb}, folder / "tensors.pt")
    content = json.loads((folder / "state.json").read_text())
    content["tensors_crc32"] = zlib.crc32((folder / "tensors.pt").read_bytes())
    (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(checkpoint.DamagedCheckpointError, match="UnpicklingError"):
        checkpoint.read_checkpoint(folder, "k")
    assert not sign.exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "a: !include /etc/passwd"]
)
def test_a_configuration_that_would_run_code_is_refused(tmp_path, capsys, text):
    (tmp_path / "a.yaml").write_text(text)
    assert main(["config", "show", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["file", "split"])
def test_a_store_whose_manifest_leads_out_of_its_folder_is_refused(tmp_path, field):
    from tmkd_ray.knowledge.store import SCHEMA_VERSION, KnowledgeStore

    record = {
        "split": "train",
        "number": 0,
        "file": "00000-0123456789ab.parquet",
        "rows": 1,
        "bytes": 1,
        "sha256": "0" * 64,
        "set_aside": [],
    }
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "class_names": ["a"],
        "layouts": {},
        "fingerprint": {},
        "shards": [record],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert KnowledgeStore(str(tmp_path)).manifest().shards[0].rows == 1
    record[field] = f"../../{record[field]}"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        KnowledgeStore(str(tmp_path)).manifest()

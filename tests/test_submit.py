"""`tmkd submit` without a cluster: what would be uploaded, what is refused, how a job's end comes out."""

import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus

from tmkd_ray.cli import main
from tmkd_ray.errors import UserError
from tmkd_ray.stages import submit

ROOT = Path(__file__).parents[1]


def test_this_repository_is_small_enough_to_upload(tmp_path):
    """At most 5 MB, with all that a job needs and nothing of what is large or made again."""
    archive = tmp_path / "a.zip"
    create_package(str(ROOT), archive, include_gitignore=True, excludes=list(submit.EXCLUDES))
    names = zipfile.ZipFile(archive).namelist()
    assert submit.upload_bytes(ROOT) == pytest.approx(archive.stat().st_size, rel=0.01)
    assert submit.upload_bytes(ROOT) <= 5e6
    tops = {name.split("/")[0] for name in names}
    assert {"tmkd_ray", "pipelines", "pyproject.toml"} <= tops
    assert not tops & {".git", ".venv", "runs", "data"}
    assert not [name for name in names if "__pycache__" in name or "_cache/" in name]


def test_what_is_excluded_whatever_gitignore_says(tmp_path):
    for name in ("keep.py", "runs/a", "data/a", ".git/a", "a/__pycache__/b.pyc", ".mypy_cache/a", "pkg/data/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    archive = tmp_path.parent / "b.zip"
    create_package(str(tmp_path), archive, include_gitignore=True, excludes=list(submit.EXCLUDES))
    files = {name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/")}
    assert files == {"keep.py", "pkg/data/a"}


def test_the_package_goes_along_only_where_the_folder_has_none(tmp_path):
    assert "py_modules" not in submit.runtime_env(ROOT)
    (module,) = submit.runtime_env(tmp_path)["py_modules"]
    assert Path(module).name == "tmkd_ray"
    assert (Path(module) / "cli.py").exists()


class Client:
    """Stands for Ray's: a job whose log comes in pieces, over a connection that breaks, and how it ends."""

    pieces = ("one\n", "two\n", "three\n")
    breaks_after: int | None = None
    status = JobStatus.SUCCEEDED
    code: int | None = 0
    interrupt = False

    def __init__(self, address):
        self.stopped, self.submitted = [], []

    def submit_job(self, **options):
        self.submitted.append(options)
        return "raysubmit_1"

    async def tail_job_logs(self, job):
        for number, piece in enumerate(self.pieces):
            if self.interrupt:
                raise KeyboardInterrupt
            if self.breaks_after == number:
                type(self).breaks_after = None
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield piece

    def get_job_info(self, job):
        return SimpleNamespace(status=self.status, driver_exit_code=self.code, message="it ended")

    def get_job_status(self, job):
        return JobStatus.STOPPED if self.stopped else self.status

    def stop_job(self, job):
        self.stopped.append(job)


@pytest.fixture
def client(monkeypatch):
    kind = type("OneClient", (Client,), {})
    monkeypatch.setattr(submit, "JobSubmissionClient", kind)
    monkeypatch.setattr(submit, "_RECONNECT_S", 0)
    return kind


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", 137, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_job_s(client, capsys, status, code, expected):
    client.status, client.code = JobStatus(status), code
    assert submit.Jobs("http://x").follow("raysubmit_1") == expected
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_broken_connection_costs_no_line_and_doubles_none(client, capsys):
    client.breaks_after = 2
    assert submit.Jobs("http://x").follow("raysubmit_1") == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_ctrl_c_stops_the_job(client, capsys):
    client.interrupt = True
    jobs = submit.Jobs("http://x")
    assert jobs.follow("raysubmit_1") == 130
    assert jobs._client.stopped == ["raysubmit_1"]
    assert "stopping raysubmit_1" in capsys.readouterr().err


def test_arguments_reach_the_job_as_they_are(client, tmp_path):
    jobs = submit.Jobs("http://x")
    jobs.submit(["run", "methods={kd: kd}", "output=s3://b/c d"], tmp_path)
    (options,) = jobs._client.submitted
    assert options["entrypoint"] == "python -m tmkd_ray run 'methods={kd: kd}' 'output=s3://b/c d'"
    assert options["runtime_env"]["working_dir"] == str(tmp_path)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Submit what must be refused before any cluster is asked, and return the message."""

    class Unreachable:
        def __init__(self, address):
            raise AssertionError("a cluster was asked")

    monkeypatch.setattr(submit, "JobSubmissionClient", Unreachable)
    monkeypatch.chdir(tmp_path)

    def refused(*words):
        assert main(["submit", *words]) == 2
        return capsys.readouterr().err

    return refused


def test_what_would_fail_or_be_lost_there_is_refused_here(refused, tmp_path):
    (tmp_path / "a.yaml").write_text("dataset: digits\noutput: /shared\ntraning: {}\n")
    assert "which command?" in refused()
    assert "'runn' is no command that computes; did you mean 'run'?" in refused("runn")
    assert "'config' is no command that computes" in refused("config", "show")
    assert "traning: unknown key; did you mean 'training'?" in refused("run", "--config", "a.yaml")
    assert "there is no folder" in refused("--working-dir", str(tmp_path / "no"), "run", "dataset=digits")
    message = refused("run", "--config", str(tmp_path / "a.yaml"))
    assert "must be a path within the working directory" in message
    assert "must be a path within" in refused("run", "--config", "../a.yaml")
    message = refused("run", "dataset=digits")
    assert "output: runs is within the copy of the working directory" in message
    assert "give the id of one job" in refused("stop")


def test_nobody_at_the_address(capsys, tmp_path):
    assert main(["submit", "--address", "http://127.0.0.1:9", "status", "raysubmit_1"]) == 2
    assert re.search(r"error: no Ray cluster answers at http://127\.0\.0\.1:9", capsys.readouterr().err)


def test_a_wrong_answer_is_no_traceback(client):
    def broken(self, job):
        raise RuntimeError("Request failed with status code 404: Job raysubmit_1 does not exist.")

    client.get_job_info = broken
    with pytest.raises(UserError, match="does not exist"):
        submit.Jobs("http://x").status("raysubmit_1")

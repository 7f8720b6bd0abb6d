"""Run commands as jobs of a Ray cluster: `ray job submit`, with this package shipped and errors told."""

import asyncio
import contextlib
import logging
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import ray.exceptions
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus, JobSubmissionClient

import tmkd_ray
from tmkd_ray.errors import UserError
from tmkd_ray.stages.progress import say

EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    "*.pyc",
    ".*_cache",
    "*.egg-info",
    "/build",
    "/dist",
    "/runs",
    "/data",
)
"""What is not uploaded, as in a .gitignore file; besides what the folder's .gitignore and .rayignore name."""

INTERRUPTED = 130
"""Exit code of a job that was stopped, as of a program after Ctrl-C."""

_STOP_WAIT_S = 30
"""For a stopped job to end by itself, giving back what it claimed; then it is killed. Ray's own 3 s are few."""

_RECONNECT_S = 2.0
_RECONNECTS = 30


def runtime_env(working_dir: Path) -> dict[str, Any]:
    """Return the environment of a job: a copy of the folder, and of this package where the folder has none.

    The job and all that it starts find both on their path, before what is installed on the machines.
    """
    environment: dict[str, Any] = {
        "working_dir": str(working_dir),
        "excludes": list(EXCLUDES),
        "env_vars": {
            "PYTHONUNBUFFERED": "1",  # so that the log is there as it is written
            "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S),
        },
    }
    if not (working_dir / tmkd_ray.__name__ / "__init__.py").exists():
        environment["py_modules"] = [str(Path(tmkd_ray.__file__).parent)]
    return environment


def upload_bytes(working_dir: Path) -> int:
    """Return how large the archive of a working directory is that goes to the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "working_dir.zip"
        create_package(str(working_dir), archive, include_gitignore=True, excludes=list(EXCLUDES))
        return archive.stat().st_size


class Jobs:
    """The jobs of a cluster.

    Args:
        address: of its dashboard, `http://127.0.0.1:8265`.

    Raises:
        UserError: no cluster answers there, or it wants another token; so do the methods.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        logging.getLogger("ray").setLevel(logging.ERROR)  # else a line for every file that is not uploaded
        with self._failures():
            self._client = JobSubmissionClient(address)

    def submit(self, arguments: Sequence[str], working_dir: Path) -> str:
        """Upload the folder and start `tmkd ARGUMENTS` in its copy; return the job's id."""
        say(f"uploading {working_dir} ({upload_bytes(working_dir) / 1e6:.1f} MB) to {self.address}")
        with self._failures():
            job: str = self._client.submit_job(
                entrypoint=shlex.join(["python", "-m", tmkd_ray.__name__, *arguments]),
                runtime_env=runtime_env(working_dir),
                metadata={"tmkd": tmkd_ray.__version__},
            )
            return job

    def follow(self, job: str) -> int:
        """Print a job's log as it comes and return its exit code; Ctrl-C stops the job, twice leaves it."""
        try:
            self._print_log(job)
            return self._code(job)
        except KeyboardInterrupt:
            say(f"\nstopping {job}; press Ctrl-C again to leave it running")
            self.stop(job)
            return INTERRUPTED

    def stop(self, job: str) -> str:
        """End a job, if it runs, and wait until it has ended; return what became of it."""
        with self._failures():
            self._client.stop_job(job)
            while not (status := self._client.get_job_status(job)).is_terminal():
                time.sleep(0.2)
        return str(status.value)

    def status(self, job: str) -> str:
        """Return a job's state in one line."""
        with self._failures():
            details = self._client.get_job_info(job)
        reason = (details.message or "").strip().partition("\n")[0]  # what follows is the log again
        return f"{job}: {details.status.value}" + (f" ({reason})" if reason else "")

    def _print_log(self, job: str) -> None:
        """Print the log until the job has ended, over a connection that may break."""
        printed = 0

        async def tail() -> None:
            nonlocal printed
            position = 0
            async for text in self._client.tail_job_logs(job):
                print(text[max(0, printed - position) :], end="", flush=True)
                position += len(text)
                printed = max(printed, position)

        breaks = 0
        while True:
            try:
                asyncio.run(tail())
            except (aiohttp.ClientError, RuntimeError, OSError) as error:
                breaks += 1
                if breaks > _RECONNECTS:
                    raise UserError(
                        f"lost the connection to {self.address}: {error}. The job goes on; "
                        f"`tmkd submit logs {job}` follows it again"
                    ) from error
                time.sleep(_RECONNECT_S)
            else:
                return

    def _code(self, job: str) -> int:
        """Return the exit code of a job whose log has ended."""
        with self._failures():
            while not (details := self._client.get_job_info(job)).status.is_terminal():
                time.sleep(0.2)
        if details.status == JobStatus.SUCCEEDED:
            return 0
        say(self.status(job))
        if details.status == JobStatus.STOPPED:
            return INTERRUPTED
        code: int = details.driver_exit_code or 1
        return code if code > 0 else 128 - code  # ended by a signal, which Python counts below zero

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at {self.address}; `ray dashboard cluster.yaml` opens a tunnel "
                "to one, and --address names another"
            ) from error
        except ray.exceptions.AuthenticationError as error:
            raise UserError(
                f"{self.address} refuses the token: set RAY_AUTH_MODE=token, with the cluster's token in "
                "~/.ray/auth_token"
            ) from error
        except (RuntimeError, ValueError) as error:  # Ray's client has nothing more special
            raise UserError(f"{self.address}: {error}") from error

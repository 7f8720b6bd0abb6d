"""`tmkd submit`: run a command as a job of a Ray cluster."""

import argparse
import os
from pathlib import Path

from tmkd_ray.commands.base import COMMANDS, Command, ConfigCommand
from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import UserError
from tmkd_ray.registry import nearest

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

ACTIONS = ("logs", "status", "stop")


@COMMANDS.register("submit")
class Submit(Command):
    description = (
        "run a command as a job of a Ray cluster; `logs`, `status` and `stop` with a job's id are about one"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.usage = (
            "tmkd submit [--address URL] [--working-dir FOLDER] [--no-follow] COMMAND [its arguments]\n"
            "       tmkd submit [--address URL] logs | status | stop JOB"
        )
        parser.add_argument(
            "--address",
            default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS),
            metavar="URL",
            help=f"of the cluster's dashboard; else $RAY_API_SERVER_ADDRESS, else {DEFAULT_ADDRESS}",
        )
        parser.add_argument(
            "--working-dir", default=".", metavar="FOLDER", help="a copy of it goes with the job (default: .)"
        )
        parser.add_argument(
            "--follow",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="print the job's log and exit as it does; Ctrl-C stops the job",
        )
        parser.add_argument(
            "job", nargs=argparse.REMAINDER, metavar="COMMAND …", help="a command of tmkd and its arguments"
        )

    def __call__(self, options: argparse.Namespace) -> int:
        words = options.job[1:] if options.job[:1] == ["--"] else options.job
        if not words:
            raise UserError("tmkd submit: which command? For example: tmkd submit run --config FILE output=URI")
        if words[0] in ACTIONS:
            return self._about(words, options.address)
        folder = Path(options.working_dir).resolve()
        if not folder.is_dir():
            raise UserError(f"--working-dir: there is no folder {folder}")
        check_job(words, folder)
        from tmkd_ray.stages.submit import Jobs

        jobs = Jobs(options.address)
        job = jobs.submit(words, folder)
        print(f"job {job} at {options.address}; `tmkd submit stop {job}` ends it", flush=True)
        return jobs.follow(job) if options.follow else 0

    def _about(self, words: list[str], address: str) -> int:
        if len(words) != 2:
            raise UserError(f"tmkd submit {words[0]}: give the id of one job")
        from tmkd_ray.stages.submit import Jobs

        jobs = Jobs(address)
        if words[0] == "logs":
            return jobs.follow(words[1])
        print(jobs.stop(words[1]) if words[0] == "stop" else jobs.status(words[1]))
        return 0


def check_job(words: list[str], folder: Path) -> None:
    """Check here what would fail, or lose its results, there.

    Args:
        words: a command of tmkd and its arguments.
        folder: the working directory, a copy of which the job runs in.

    Raises:
        UserError: no such command; the configuration is wrong or not in the folder; `output` is relative.
    """
    name, *rest = words
    computing = [other for other in COMMANDS if COMMANDS.get(other).computes]
    if name not in computing:
        guess = nearest(name, computing)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise UserError(
            f"tmkd submit: {name!r} is no command that computes{hint} Choices: {', '.join(computing)}"
        )
    command = COMMANDS.get(name)()
    if not isinstance(command, ConfigCommand):
        return
    parser = argparse.ArgumentParser(prog=f"tmkd {name}")
    command.add_arguments(parser)
    options, more = parser.parse_known_args(rest)
    overrides = [*options.overrides, *more]
    if not all("=" in override for override in overrides):
        return  # `knowledge show` and its like, or a mistake that the command tells of
    path = options.config
    if path is not None and path != parser.get_default("config"):
        path = (folder / path).resolve()
        if not path.is_relative_to(folder) or Path(options.config).is_absolute():
            raise UserError(
                f"--config: {options.config} must be a path within the working directory, {folder}, "
                "a copy of which goes with the job"
            )
    config = read_config(path, overrides)
    if "://" not in config.output and not Path(config.output).is_absolute():
        raise UserError(
            f"output: {config.output} is within the copy of the working directory that the job runs in, and "
            "lost with it; give a folder that all machines share (output=/…) or an object store (output=s3://…)"
        )

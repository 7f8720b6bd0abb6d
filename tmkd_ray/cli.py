"""The command line: `tmkd COMMAND …`; the commands are in `tmkd_ray/commands/`."""

import argparse
import sys
from collections.abc import Sequence

from tmkd_ray import __version__
from tmkd_ray.commands import COMMANDS, Command
from tmkd_ray.errors import UserError

USER_ERROR = 2
"""Exit code of what a user can mend; a defect of the program shows its traceback and exits with 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = _parser()
    # argparse takes only the first group of overrides; those behind a later option come back as unknown.
    options, rest = parser.parse_known_args(arguments)
    command: Command = options.command
    has_open_end = hasattr(options, command.open_end)
    unknown = [argument for argument in rest if argument.startswith("-") or not has_open_end]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        getattr(options, command.open_end).extend(rest)
    try:
        return command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tmkd",
        description="Knowledge distillation on Ray, with text-guided multi-view teachers.",
    )
    parser.add_argument("--version", action="version", version=f"tmkd-ray {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = COMMANDS.get(name)()
        sub = commands.add_parser(name, help=command.description, description=command.description)
        command.add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())

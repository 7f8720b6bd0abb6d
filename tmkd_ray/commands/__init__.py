"""The commands of `tmkd`, one file each."""

from tmkd_ray.commands.base import COMMANDS, Command
from tmkd_ray.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = ["COMMANDS", "Command"]

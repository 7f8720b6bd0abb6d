"""Entry point for `ray job submit -- python pipelines/run.py --config FILE …`: the command `tmkd run`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

"""Entry point for `ray job submit -- python pipelines/distill.py --config FILE …`: the command `tmkd distill`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))

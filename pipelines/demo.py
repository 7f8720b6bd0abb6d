"""Entry point for `ray job submit -- python pipelines/demo.py --config FILE …`: the command `tmkd demo`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))

"""The command `tmkd run`, for `ray job submit -- python pipelines/run.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

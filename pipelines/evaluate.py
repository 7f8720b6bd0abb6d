"""The command `tmkd evaluate`, for `ray job submit -- python pipelines/evaluate.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

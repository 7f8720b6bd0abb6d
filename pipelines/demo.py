"""The command `tmkd demo`, for `ray job submit -- python pipelines/demo.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))

"""The command `tmkd distill`, for `ray job submit -- python pipelines/distill.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))

"""The command `tmkd fit-clip`, for `ray job submit -- python pipelines/fit_clip.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit-clip", *sys.argv[1:]]))

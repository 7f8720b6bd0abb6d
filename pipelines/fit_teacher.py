"""The command `tmkd fit-teacher`, for `ray job submit -- python pipelines/fit_teacher.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit-teacher", *sys.argv[1:]]))

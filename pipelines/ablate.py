"""The command `tmkd ablate`, for `ray job submit -- python pipelines/ablate.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))

"""The command `tmkd transfer`, for `ray job submit -- python pipelines/transfer.py TASK --student PATH …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["transfer", *sys.argv[1:]]))

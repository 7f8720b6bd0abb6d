"""The command `tmkd knowledge`, for `ray job submit -- python pipelines/knowledge.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["knowledge", *sys.argv[1:]]))

"""The command `tmkd search`, for `ray job submit -- python pipelines/search.py --config FILE …`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))

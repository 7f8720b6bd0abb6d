"""Entry point for `ray job submit -- python pipelines/knowledge.py --config FILE …`: the command `tmkd knowledge`."""

import sys

from tmkd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["knowledge", *sys.argv[1:]]))

import sys

from tmkd_ray.cli import main

sys.exit(main())

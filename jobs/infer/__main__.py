"""`python -m jobs.infer job.yaml`: what `ray job submit` runs; the same as `masklake infer job.yaml`."""

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["infer"]
    main()

"""`python -m jobs.infer job.yaml`: what `ray job submit` runs; the same as `masklake infer`."""

from jobs.cli import app

if __name__ == "__main__":
    app(prog_name="python -m jobs.infer", args=None)

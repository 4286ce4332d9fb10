"""What is stored (labels.py), what a job is asked to do (specs.py), and how either fails (errors.py).

pyarrow and pydantic; no torch, no ray.
"""

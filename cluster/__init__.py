"""Where it runs: session.py joins or starts a Ray cluster, profiles.py sizes the pools.

ray; no tensors, no tables.
"""

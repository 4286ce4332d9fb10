"""Re-labels a lake: what is new, changed or stale, and a gate before it counts."""

"""The demonstration: rendered scenes, the bundled checkpoint, and the tour of `masklake demo`."""

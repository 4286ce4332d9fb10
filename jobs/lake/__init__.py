"""Storage, sources and tables. fsspec, pyarrow, deltalake and duckdb; no ray, no torch."""

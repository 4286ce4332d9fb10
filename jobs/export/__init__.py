"""`masklake model`: weights of other projects in, ours out, and what a file holds."""

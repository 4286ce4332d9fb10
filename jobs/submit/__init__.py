"""`masklake submit` and `masklake jobs`: the same commands on a cluster, through Ray's Jobs API."""

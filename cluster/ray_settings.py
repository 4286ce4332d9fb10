"""Environment variables that every process of Ray should have, wherever we start or describe one."""

from typing import Final

RAY_SETTINGS: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A node that loses its power says nothing, and Ray asks a silent connection after 5 minutes, for 2 more:
    # that is how long runs stood still in tests/chaos. Its servers take questions this often.
    "RAY_grpc_client_keepalive_time_ms": "20000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    # At Ray's 15 what has no niceness displaces the threads that work for long: on two busy cores a training
    # step took 1.14 to 1.24 times as long as without Ray. With 0: benchmarks/training_overhead.py.
    "RAY_worker_niceness": "0",
}

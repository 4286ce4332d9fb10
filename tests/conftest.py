"""For every test: the real photographs, a local Ray, and an environment without the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from cluster.session import ClusterInfo

# Set before any test imports Ray or a storage client, and before Ray starts the workers that inherit it. The
# S3 servers of tests/integration take these keys; workers learn their endpoint from a spec.
for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
    if name != "AWS_CA_BUNDLE":
        del os.environ[name]
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    AWS_ACCESS_KEY_ID="masklake-tests",
    AWS_SECRET_ACCESS_KEY="not-a-secret",
    AWS_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
)

# Examples are judged by what they do, not by how busy the machine is.
settings.register_profile("masklake", deadline=None)
settings.load_profile("masklake")

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs with annotations, beside the checkout: ../shared/data."""
    if not _SHARED_DATA.is_dir():
        pytest.skip("the real photographs, ../shared/data beside the checkout, are not here")
    return _SHARED_DATA


@pytest.fixture(scope="session")
def local_ray() -> Iterator[ClusterInfo]:
    """One embedded Ray of two CPUs for all tests, for it takes 10 s to start; connect() then joins it."""
    from cluster import session

    yield session.connect(num_cpus=2)
    session.shutdown()

"""For every test: the real photographs, and an environment without the user's own clusters and buckets."""

import os
from pathlib import Path

import pytest

# Before any test imports Ray or a storage client.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
for name in ("RAY_ADDRESS", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CONFIG_FILE"):
    os.environ.pop(name, None)
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs with annotations, beside the checkout: ../shared/data."""
    if not _SHARED_DATA.is_dir():
        pytest.skip("the real photographs are not here: ../shared/data, beside the checkout")
    return _SHARED_DATA

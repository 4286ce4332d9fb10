import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import ray

from cluster import session
from cluster.session import ClusterInfo, connect
from schemas.errors import UsageError


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[ClusterInfo]:
    yield connect(num_cpus=1)
    session.shutdown()


def problem(address: str) -> str:
    with pytest.raises(UsageError) as caught:
        connect(address)
    return str(caught.value)

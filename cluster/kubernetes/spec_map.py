"""How a spec travels: in a ConfigMap, as a file of the head, where the driver runs.

Enters: the content of a spec file. Leaves: the ConfigMap, the volume that shows it, the command that reads
it. A file, and not an environment variable as with `masklake submit`: `kubectl edit configmap` shows it as
it was written, and it may be longer than the 128 KiB that the kernel lets a variable be.
"""

from collections.abc import Mapping
from typing import Any

from cluster.kubernetes.pools import RayCluster
from cluster.kubernetes.yaml_text import Manifest, spec_text
from cluster.reachable import check_reachable
from schemas.errors import UsageError

FOLDER = "/etc/masklake"
MOUNT = {"name": "spec", "mountPath": FOLDER, "readOnly": True}
# A ConfigMap holds 1 MiB, keys and other entries included.
_MAX_BYTES = 1_000_000


def entrypoint(job: str) -> str:
    """The command that the driver runs: infer, relabel or train, as on a laptop."""
    return f"masklake {job} {FOLDER}/{job}.yaml"


def spec_file(job: str) -> str:
    """The spec's name in the ConfigMap and in FOLDER."""
    return f"{job}.yaml"


def volume(cluster: RayCluster, key: str) -> Manifest:
    """One entry of the ConfigMap, as a file."""
    return {"name": "spec", "configMap": {"name": cluster.name, "items": [{"key": key, "path": key}]}}


def spec_data(job: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The ConfigMap's data.

    Raises:
        UsageError: the spec names a path of this machine, which no pod sees, or is too long for a ConfigMap.
    """
    check_reachable(spec, "no pod", shared_disks=False)
    text = spec_text(spec)
    if len(text.encode()) > _MAX_BYTES:
        raise UsageError(
            f"the spec is {len(text.encode()):,} bytes long, and a ConfigMap holds {_MAX_BYTES:,}: name a "
            "list in object storage instead of writing it out"
        )
    return {spec_file(job): text}

"""Whether a spec's places can be seen from another machine.

Enters: the content of a spec file that its model took. Leaves: nothing, or a UsageError that names the first
place which is a path of this machine, or of a scheme that no job reads.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from schemas.errors import UsageError
from schemas.spec_problems import show

_PRESETS = ("demo", "lite", "r50_fpn", "r50_fpn_v2", "r101_fpn")  # names of models, not places
_OBJECT_STORAGE = ("s3://", "gs://")
_LOCATIONS = (
    ("source", "uri"),
    ("model", "uri"),
    ("model", "backbone"),
    ("lake", "uri"),
    ("gate", "annotations"),
    ("out", "uri"),
    ("register_as", "lake"),
)


def check_reachable(spec: Mapping[str, Any], who: str, *, shared_disks: bool) -> None:
    """Refuse paths of this machine, and schemes that no job on a cluster reads.

    Args:
        who: that is to read the places: "no pod", "no node".
        shared_disks: file:///… is taken for a disk that every node has; whoever runs the cluster must allow
            it.

    Raises:
        UsageError: a place is a path, or neither object storage nor a shared disk.
    """
    for where, uri in _places(spec):
        if where == "model.uri" and (uri in _PRESETS or uri.startswith(("alias:", "registry:"))):
            continue
        place = uri.removeprefix("coco:").removeprefix("lake:")
        is_shared = place.startswith("file:///") and shared_disks
        if "://" not in place or (place.startswith("file://") and not is_shared):
            or_disk = ", or file:///… for a disk that every node mounts" if shared_disks else ""
            raise UsageError(
                f"{where} {show(uri)} is a path of this machine, which {who} sees: wanted object storage "
                f"such as s3://bucket/prefix{or_disk}"
            )
        if not is_shared and not place.startswith(_OBJECT_STORAGE):
            raise UsageError(
                f"{where}: {place.partition('://')[0]}:// is not read on a cluster, wanted object storage: "
                "s3://bucket/prefix or gs://bucket/prefix"
            )


def _places(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data_sets = {f"data.{name}": data for name, data in (spec.get("data") or {}).items()}
    data_sets["evaluate.data"] = (spec.get("evaluate") or {}).get("data")
    found = [(f"{section}.{key}", (spec.get(section) or {}).get(key)) for section, key in _LOCATIONS]
    for where, data in data_sets.items():
        found += [(f"{where}.{key}", (data or {}).get(key)) for key in ("uri", "images")]
    return ((where, str(uri)) for where, uri in found if uri is not None)

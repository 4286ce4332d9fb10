"""The JSON beside an exported .pth: what a bare state dict cannot say.

Enters: a checkpoint. Leaves: JSON; and back, so that export and import together change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from maskrcnn_core.config import MaskRCNNConfig
from maskrcnn_core.torchvision_format import torchvision_target
from schemas.errors import UsageError

FORMAT = "masklake-sidecar-1"


@dataclass(frozen=True)
class Sidecar:
    """sha256: of the weights file it belongs to, in hex."""

    sha256: str
    name: str
    config: MaskRCNNConfig
    provenance: Mapping[str, Any]

    def to_json(self) -> bytes:
        values = {
            "format": FORMAT,
            "sha256": self.sha256,
            "name": self.name,
            "config": self.config.to_dict(),
            "provenance": dict(self.provenance),
            "torchvision": asdict(torchvision_target(self.config)),  # for readers; not read back
        }
        return json.dumps(values, indent=2).encode()


def parse_sidecar(data: bytes, sha256: str, where: str) -> Sidecar | None:
    """Read one; None for JSON of somebody else.

    Raises:
        UsageError: it is damaged, or of another weights file.
    """
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            return None
        config = MaskRCNNConfig.from_dict(values["config"])
        sidecar = Sidecar(values["sha256"], values["name"], config, values["provenance"])
    except UnicodeDecodeError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{where} is damaged or of a newer version: {error}; remove it to do without."
        ) from error
    if sidecar.sha256 != sha256:
        raise UsageError(
            f"{where} belongs to weights with sha256 {sidecar.sha256[:12]}…, these have {sha256[:12]}…; "
            "remove it, or bring back the file it belongs to."
        )
    return sidecar

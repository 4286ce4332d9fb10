"""Training processes find each other by the addresses that Ray knows their machines by.

Enters: a machine's address. Leaves: GLOO_SOCKET_IFNAME of each worker, before its process group is made.
Gloo takes the address that a machine's name leads to; that is loopback where /etc/hosts says so, as Debian's
does, or where nobody knows the name, and then no other machine can reach it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.util import get_node_ip_address

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass
class OwnAddressConfig(TorchConfig):
    """TorchConfig whose workers listen where Ray does; what the user has set stays."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OwnAddressBackend


class _OwnAddressBackend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        worker_group.execute(use_own_interface)
        super().on_start(worker_group, backend_config)


def use_own_interface() -> None:
    """In a worker: name the interface of this machine's address to Gloo."""
    address = str(get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray's types stop here
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault(_VARIABLE, interface)


def interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address; None where there is none.

    Source: netdevice(7), SIOCGIFADDR.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None

"""Which interface Gloo is told to use, jobs/train/own_address.py. tests/chaos has machines of their own."""

import os

import pytest

from jobs.train import own_address
from jobs.train.own_address import interface_of, use_own_interface


def test_loopback_is_found_by_its_address_and_no_interface_has_one_of_a_test_network() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("198.51.100.7") is None


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_address, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    use_own_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_own_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "lo"

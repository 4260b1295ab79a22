"""Which interface gloo is told to use, and when it is left alone; `scripts/two_hosts` tries it for real."""

from __future__ import annotations

import os
import socket

import pytest

from engine import EngineError, network

pytestmark = pytest.mark.skipif(not hasattr(socket, "if_nameindex"), reason="no list of interfaces here")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One of two hosts, with two networks, whose own name is a loopback address."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(network, "_address_of_name", lambda: "127.0.1.1")
    monkeypatch.setattr(
        network, "_interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2", "docker0": "172.17.0.1"}
    )
    monkeypatch.setattr(network, "_address_towards", lambda host: "10.0.0.2")
    return monkeypatch


def chosen(size: int = 4) -> str | None:
    """What is in the environment afterwards; it is put back as it was."""
    try:
        network.choose_interface(size)
        return os.environ.get("GLOO_SOCKET_IFNAME")
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.mark.parametrize("address", ["127.0.1.1", "::1", None])
def test_the_interface_that_leads_to_the_master_is_taken(address: str | None, host: pytest.MonkeyPatch) -> None:
    host.setattr(network, "_address_of_name", lambda: address)
    assert chosen() == "eth0"


def test_gloo_is_left_alone_where_the_hosts_name_can_be_reached(host: pytest.MonkeyPatch) -> None:
    host.setattr(network, "_address_of_name", lambda: "10.0.0.2")
    assert chosen() is None


def test_gloo_is_left_alone_on_a_single_host(host: pytest.MonkeyPatch) -> None:
    assert chosen(size=2) is None
    host.delenv("LOCAL_WORLD_SIZE")
    assert chosen(size=4) is None


def test_what_the_user_has_set_stays(host: pytest.MonkeyPatch) -> None:
    host.setenv("GLOO_SOCKET_IFNAME", "docker0")
    network.choose_interface(4)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "docker0"


def test_a_master_that_is_loopback_here_is_an_error_that_lists_the_interfaces(host: pytest.MonkeyPatch) -> None:
    host.setattr(network, "_address_towards", lambda host: "127.0.0.1")
    with pytest.raises(EngineError, match=r"interfaces: eth0 \(10\.0\.0\.2\), docker0 \(172\.17\.0\.1\); set GLOO"):
        network.choose_interface(4)
    host.setattr(network, "_interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.2"})
    assert chosen() == "eth0"  # there is no other


def test_what_this_machine_says_of_itself_can_be_read() -> None:
    assert network._interfaces().get("lo", "127.0.0.1") == "127.0.0.1"
    assert network._address_towards("127.0.0.1") == "127.0.0.1"
    assert network._address_towards("no.such.host.invalid") is None

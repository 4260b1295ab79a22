"""Over which of its network interfaces a host's processes are reached from other hosts.

gloo binds to the address that the host's name has on the host itself, and tells it to the others. Where that is a
loopback address, as Debian's installer writes into /etc/hosts, or where the name has none, processes of several
hosts would look for each other each on its own host, until the timeout. The interface that leads to MASTER_ADDR is
then the one to take.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

from engine.errors import EngineError
from engine.log import log

__all__ = ["choose_interface"]

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # of Linux


def choose_interface(size: int) -> None:
    """Name gloo an interface, in the environment, where several hosts would otherwise meet on loopback addresses.

    Args:
        size: number of processes on all hosts; torchrun's environment has the other numbers.

    Raises:
        EngineError: nothing tells which interface leads to the other hosts.
    """
    several = size > int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if not several or _VARIABLE in os.environ or not sys.platform.startswith("linux"):
        return
    mine = _address_of_name()
    if mine is not None and not _is_loopback(mine):
        return
    master = os.environ["MASTER_ADDR"]
    interfaces = {address: name for name, address in _interfaces().items() if not _is_loopback(address)}
    name = interfaces.get(_address_towards(master) or "")
    if name is None and len(interfaces) == 1:
        (name,) = interfaces.values()
    host = socket.gethostname()
    found = f"this host's name, {host}, is {mine or 'no address'} here"
    if name is None:
        known = ", ".join(f"{name} ({address})" for address, name in interfaces.items()) or "none"
        raise EngineError(
            f"network: {found} and MASTER_ADDR {master} is this host itself, so that nothing tells which address the "
            f"other hosts can reach; interfaces: {known}; set {_VARIABLE} to the name of the right one"
        )
    os.environ[_VARIABLE] = name
    log.info("network: %s, which other hosts cannot reach; gloo uses %s, towards MASTER_ADDR", found, name)


def _address_of_name() -> str | None:
    """What gloo takes by itself: the first address of this host's name that can be bound."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as trial:
            try:
                trial.bind(address)
            except OSError:
                continue
            return str(address[0])
    return None


def _address_towards(host: str) -> str | None:
    """This host's address on the way to another; nothing is sent."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind, protocol) as trial:
            trial.connect(address)
            return str(trial.getsockname()[0])
    except OSError:
        return None


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    import fcntl  # not there on Windows

    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(reply[20:24])
    return addresses


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"

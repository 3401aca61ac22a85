"""Identifies the client of a request or a connection by its network address."""

import ipaddress
from functools import lru_cache

from starlette.types import Scope

IPV6_HOST_BITS = 64  # one customer gets a whole /64 (RFC 6177), so all of it is one client


@lru_cache(4096)
def client_of(host: str) -> str:
    """Return the client at *host*: an IPv4 address, or the /64 of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket has no address
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(address) >> IPV6_HOST_BITS << IPV6_HOST_BITS)}/{IPV6_HOST_BITS}"


def client_address(scope: Scope) -> str:
    """Return the client of *scope*, as `client_of` does; "" without an address."""
    return client_of(scope["client"][0]) if scope.get("client") else ""

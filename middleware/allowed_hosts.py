"""Refuses requests whose Host header does not name this service, which prevents DNS rebinding."""

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import Scope

import errors
from web.request_state import header_values

# RFC 9110, section 7.2: a name or address, an IPv6 one in brackets, and perhaps a port.
_HOST = re.compile(r"([^\[\]:@/?#\s]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")

SPELLINGS_REMEMBERED = 256  # `*.example.com` and ports allow any number of them
SPELLING_MAX_BYTES = 259  # the longest name of DNS (RFC 1035) and a port


class WrongHost(errors.Problem):
    status = 400
    sentence = "The Host header must name this service, once"


class AllowedHosts:
    """Names, addresses, and `*.example.com` for all names below `example.com`."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._exact = {_name(host) for host in hosts}
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*."))
        self._ours: set[bytes] = set()  # accepted spellings; refused ones are not kept

    def admit(self, scope: Scope) -> bool:
        """Return whether the Host header names one of them. The caller exempts probes, sent to an address."""
        sent = header_values(scope, b"host")
        if len(sent) != 1:
            return False
        if sent[0] in self._ours:
            return True
        host = _name(sent[0].decode("latin-1"))
        is_ours = host in self._exact or host.endswith(self._suffixes)
        if is_ours and len(self._ours) < SPELLINGS_REMEMBERED and len(sent[0]) <= SPELLING_MAX_BYTES:
            self._ours.add(sent[0])
        return is_ours


def _name(host: str) -> str:
    """Return *host* normalised and without its port; "" if it is malformed."""
    if not (parts := _HOST.fullmatch(host)):
        return ""
    name: str = parts[1].lower()
    if not name.startswith("["):
        return name
    try:
        return f"[{ipaddress.IPv6Address(name[1:-1]).compressed}]"
    except ValueError:
        return ""

"""Only requests to a name of ours: a page that makes its own name point here gets nothing (DNS rebinding)."""

import ipaddress
import re
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

import errors
from readiness import PROBES

# RFC 9110, section 7.2: a name or address, an IPv6 one in brackets, and perhaps a port.
_HOST = re.compile(r"([^\[\]:@/?#\s]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")


class WrongHost(errors.Problem):
    status = 400
    sentence = "The Host header must name this service, once"


class AllowedHostsMiddleware:
    """Refuses what was sent to another host. Health checks go by address, so theirs may be any.

    *hosts* are names, addresses, and `*.example.com` for all names below `example.com`.
    """

    def __init__(self, app: ASGIApp, hosts: list[str]) -> None:
        self.app = app
        self._exact = {_name(host) for host in hosts}
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES or self._is_ours(scope):
            await self.app(scope, receive, send)
            return
        await errors.render(scope, WrongHost())(scope, receive, send)

    def _is_ours(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"host"]
        if len(sent) != 1:
            return False
        host = _name(sent[0].decode("latin-1"))
        return host in self._exact or host.endswith(self._suffixes)


@lru_cache(1024)
def _name(host: str) -> str:
    """Return *host* without its port and spelt in one way; nothing of what is no host."""
    if not (parts := _HOST.fullmatch(host)):
        return ""
    name: str = parts[1].lower()
    if not name.startswith("["):
        return name
    try:
        return f"[{ipaddress.IPv6Address(name[1:-1]).compressed}]"
    except ValueError:
        return ""

"""Translates a PostgreSQL URL, as libpq and Neon write it, into the driver's arguments."""

import contextlib
import math
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import tls

# PostgreSQL's manual, section 34.1.2; a parameter that is not here is refused by name.
_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "channel_binding": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
}
_TLS_PARAMETERS = {"sslmode", "sslrootcert", "sslcert", "sslkey", "sslnegotiation", "channel_binding"}
_OTHER_PARAMETERS = {"application_name", "connect_timeout", "options", "pgbouncer", "target_session_attrs"}


@dataclass(frozen=True)
class PostgresTarget:
    """Where a database is, as keyword arguments of `asyncpg.connect`."""

    arguments: dict[str, Any]

    @property
    def pooled(self) -> bool:
        """Whether there is a pooler in transaction mode in between, which shares server connections."""
        return not self.arguments["statement_cache_size"]


def parse(url: str) -> PostgresTarget:
    """Read a `postgres://` or `postgresql://` URL, with `+asyncpg` or without.

    `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, `channel_binding`, `connect_timeout`, `options`,
    `application_name` and `target_session_attrs` mean what libpq means by them. `pgbouncer=true`
    announces a pooler in transaction mode; Neon's `-pooler` hosts are recognised.

    Raises:
        ValueError: a sentence that does not repeat the URL, which holds a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a valid URL") from None  # the cause may repeat a piece of the password
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError("has a password with a character that must be escaped: / as %2F, ? as %3F, # as %23")
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := parameters.keys() - _TLS_PARAMETERS - _OTHER_PARAMETERS - {"host"}:
        raise ValueError(f"has a parameter that is not known: {', '.join(sorted(unknown))}")
    host = unquote(host) if host else parameters.get("host")
    if not host or "," in host:
        raise ValueError("must name one host" if host else "names no host")
    for name, choices in _CHOICES.items():
        if parameters.get(name) and parameters[name] not in choices:
            article = "an" if name.startswith("ssl") else "a"
            raise ValueError(f"has {article} {name} that is not one of {', '.join(choices)}")
    pooled = _flag(parameters, "pgbouncer") or host.split(".")[0].endswith("-pooler")
    arguments: dict[str, Any] = {
        "host": host,
        "port": 5432 if port is None else port,
        "user": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else None,
        "database": unquote(parts.path.lstrip("/")) or None,
        "timeout": _seconds(parameters.get("connect_timeout")),
        "ssl": _tls(parameters),
        "direct_tls": parameters.get("sslnegotiation") == "direct" or None,
        # A pooler may run each statement on another server connection, which lacks the prepared one.
        "statement_cache_size": 0 if pooled else 100,
        "server_settings": {
            name: parameters[name] for name in ("application_name", "options") if parameters.get(name)
        },
    }
    if parameters.get("target_session_attrs"):
        arguments["target_session_attrs"] = parameters["target_session_attrs"]
    return PostgresTarget(arguments)


def _tls(parameters: dict[str, str]) -> ssl.SSLContext | str | bool:
    """Return the driver's `ssl` argument: off, its own "try TLS first", or a context that we built."""
    mode = parameters.get("sslmode") or "prefer"
    root = parameters.get("sslrootcert") or None
    if parameters.get("channel_binding") == "require" or root == "system":
        # asyncpg has no channel binding; checking the server's name is the next best protection.
        mode, root = "verify-full", root if root != "system" else None
    if mode == "disable":
        return False
    if mode in ("allow", "prefer"):
        return "prefer"
    checked = mode != "require" or root is not None  # libpq: a root certificate makes require check it
    context = tls.with_minimum_version(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.check_hostname = mode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if checked else ssl.CERT_NONE
    if root:
        with _readable("sslrootcert"):
            context.load_verify_locations(Path(root).expanduser())
    else:
        context.load_default_certs()
    if certificate := parameters.get("sslcert"):
        key = parameters.get("sslkey")
        with _readable("sslcert"):
            context.load_cert_chain(Path(certificate).expanduser(), Path(key).expanduser() if key else None)
    return context


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # ssl.SSLError; `~` without a home; U+0000
        raise ValueError(f"has an {name} that cannot be read") from error


def _seconds(value: str | None) -> float | None:
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError("has a connect_timeout that is not a number of seconds")
    return seconds if seconds > 0 else None


def _flag(parameters: dict[str, str], name: str) -> bool:
    return parameters.get(name, "").lower() in ("1", "true", "yes")

"""Settings: from the environment and `.env`, checked at start with one sentence per mistake."""

import contextlib
import errno
import hashlib
import ipaddress
import os
import re
import secrets
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from auth.tokens import ALGORITHMS
from database.base import DEFAULT_TIMEOUTS

SECRET_MIN = 32
BROWSER_CONNECTIONS = 6  # to one host
# Better Auth falls back to this one if no secret is set, so it is publicly known.
_PUBLIC_SECRET = "better-auth-secret-12345678901234567890"  # noqa: S105 - refused below
# An origin as browsers write it: lower case, no path, no user, a port in digits (RFC 6454, section 6.2).
_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_ALGORITHMS = frozenset(ALGORITHMS)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RATE = re.compile(r"off|[1-9]\d{0,8}/([1-9]\d{0,3} ?)?(second|minute|hour|day)s?")
# As in a Host header without its port (RFC 9110, section 7.2); a star stands for names below a domain.
_HOST = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]")


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _secret(value: str) -> str:
    if len(value.strip()) < SECRET_MIN:
        raise PydanticCustomError("secret", f"must be at least {SECRET_MIN} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("secret", "must be UTF-8") from error
    if value == _PUBLIC_SECRET:
        raise PydanticCustomError("secret", "is Better Auth's public default; make one of your own")
    return value


def _versioned_secrets(value: str) -> str:
    for part in value.split(","):
        if not re.fullmatch(r"\d+:.+", part.strip()):
            raise PydanticCustomError("secret", "must look like 2:newest,1:older")
        _secret(_unversioned(part))
    return value


def _unversioned(part: str) -> str:
    return part.strip().partition(":")[2]


def _duration(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,8}[smhd]", value):
        raise PydanticCustomError("duration", "must be a number and a unit: 15m, 24h or 7d")
    return value


def _seconds(duration: str) -> int:
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def _origin_list(value: str) -> str:
    for origin in _origins(value):
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise PydanticCustomError(
                "origin", "must be origins like https://app.example.com, separated by commas"
            )
    return value


def _address(value: str) -> str:
    if not _is_address(value):
        raise PydanticCustomError("address", "must be an address like https://app.example.com")
    return value


def _base_address(value: str) -> str:
    if "?" in value:
        raise PydanticCustomError("address", "must be an address like https://app.example.com")
    return _address(value).rstrip("/")


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        named = parts.hostname and parts.port != 0 and "@" not in parts.netloc  # the URL is logged
    except ValueError:  # unclosed brackets, or a port that is not a number up to 65535
        return False
    # urlsplit drops line feeds and tabs, so its result may differ from the URL that is fetched.
    written = value.isprintable() and not any(
        character.isspace() or character in "\\#" for character in value
    )
    return bool(parts.scheme in ("http", "https") and named and written)


def _algorithm_list(value: str) -> str:
    if not (listed := _listed(value)) or not listed <= _ALGORITHMS:
        raise PydanticCustomError("algorithm", f"must be of {', '.join(sorted(_ALGORITHMS))}")
    return value


def _number_of_workers(value: object) -> object:
    text = str(value).lower()
    if text != "auto" and not re.fullmatch(r"[1-9]\d{0,2}|1000", text):
        raise PydanticCustomError("workers", "must be a number from 1 to 1000, or auto")
    return text if text == "auto" else int(text)


def _rate(value: str) -> str:
    if not _RATE.fullmatch(value):
        raise PydanticCustomError("rate", "must be off or look like 600/minute or 100/10 seconds")
    return value


def _redis_address(value: str) -> str:
    try:
        parts = urlsplit(value)
        named = parts.hostname and parts.port != 0
    except ValueError:
        named = None
    plain = re.fullmatch(r"rediss?://[^\s/?#]+(/\d{0,4})?", value)  # no options: the timeouts are ours
    if not named or not plain:
        raise PydanticCustomError("redis", "must look like redis://user:password@host:6379/0, or rediss://")
    return value


def _network_list(value: str) -> str:
    for network in _parts(value):
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise PydanticCustomError(
                "network", "must be addresses or networks like 10.0.0.0/8, separated by commas"
            ) from error
    return value


def _host_list(value: str) -> str:
    hosts = _parts(value.lower())
    if not hosts or not all(map(_HOST.fullmatch, hosts)):
        raise PydanticCustomError(
            "host", "must be names without a port, like api.example.com or *.example.com, separated by commas"
        )
    return value


def _parts(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _listed(value: str | None) -> frozenset[str]:
    return frozenset(_parts(value or ""))


def _origins(value: str) -> list[str]:
    return [origin.strip().rstrip("/").lower() for origin in value.split(",") if origin.strip()]


class Settings(BaseModel):
    """The settings. Constructed directly, as in tests, they read no environment."""

    environment: Annotated[Literal["development", "production"], BeforeValidator(_lower)] = "development"
    database_url: str | None = Field(None, repr=False)
    database_pool_size: int = Field(10, ge=1, le=1000)
    database_connect_timeout_s: float = Field(DEFAULT_TIMEOUTS.connect_s, gt=0, le=60)
    database_statement_timeout_s: float = Field(DEFAULT_TIMEOUTS.statement_s, gt=0, le=300)
    database_wait_s: float = Field(DEFAULT_TIMEOUTS.wait_s, gt=0, le=60)
    migrate_on_start: bool | None = None
    data_dir: Path = Path("data")
    better_auth_secret: Annotated[str, AfterValidator(_secret)] | None = Field(None, repr=False)
    better_auth_secrets: Annotated[str, AfterValidator(_versioned_secrets)] | None = Field(None, repr=False)
    better_auth_url: Annotated[str, AfterValidator(_base_address)] | None = None
    jwks_url: Annotated[str, AfterValidator(_address)] | None = None
    jwks: str | None = Field(None, repr=False)
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    jwt_algorithms: Annotated[str, AfterValidator(_algorithm_list)] | None = None
    cursor_secret: Annotated[str, AfterValidator(_secret)] | None = Field(None, repr=False)
    jwt_leeway_s: float = Field(10, ge=0, le=300)
    jwt_expiration: Annotated[str, AfterValidator(_duration)] = "7d"
    # A stolen token can be renewed for this long, unless its user ends the sessions.
    session_max_age: Annotated[str, AfterValidator(_duration)] = "30d"
    max_tasks_per_user: int = Field(10_000, ge=0)
    trash_days: int = Field(30, ge=0, le=3650)
    sync_days: int = Field(30, ge=0, le=3650)
    delete_status: Literal["204", "200"] = "204"
    local_accounts: bool | None = None
    allowed_origins: Annotated[str, AfterValidator(_origin_list)] = "http://localhost:3000"
    request_deadline_s: float = Field(8, gt=0, le=300)
    shutdown_grace_s: int = Field(10, ge=0, le=3600)
    allowed_hosts: Annotated[str, AfterValidator(_host_list)] = "*"
    trusted_proxies: Annotated[str, AfterValidator(_network_list)] | None = None
    # A connection is an open file, and a process may usually have 1,024 of these.
    max_connections: int = Field(900, ge=1, le=1_000_000)
    # Enough for 40 browsers behind one address.
    max_connections_per_address: int = Field(256, ge=1, le=1_000_000)
    # Each is an open connection too.
    max_streams: int = Field(5_000, ge=0, le=1_000_000)
    max_streams_per_user: int = Field(10, ge=0, le=1_000_000)
    # Enough for a front end that loads ten things every second.
    rate_limit: Annotated[str, BeforeValidator(_lower), AfterValidator(_rate)] = "600/minute"
    # Enough for all users behind an office's address to sign in within a minute. Invalid tokens count too.
    rate_limit_anonymous: Annotated[str, BeforeValidator(_lower), AfterValidator(_rate)] = "120/minute"
    rate_limit_storage_url: Annotated[str, AfterValidator(_redis_address)] | None = Field(None, repr=False)
    docs: bool = True
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    workers: Annotated[int | Literal["auto"], BeforeValidator(_number_of_workers)] = 1
    debug: bool = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)
    ] = "info"
    log_format: Annotated[Literal["console", "json"], BeforeValidator(_lower)] | None = None
    access_log: bool = True
    slow_statement_ms: float = Field(500, gt=0)
    metrics: bool = True
    metrics_port: int | None = Field(None, ge=1, le=65535)
    metrics_token: Annotated[str, AfterValidator(_secret)] | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _complete(self) -> "Settings":
        missing = []
        if self.environment == "production" and not self.database_url:
            missing.append("DATABASE_URL: must be given in production")
        if not (self.has_secrets or self.has_keys):
            missing.append(
                "BETTER_AUTH_SECRET: must be given, the same as your front end's, or BETTER_AUTH_URL; "
                "only the embedded database in development makes a secret by itself"
            )
        elif self.local_accounts and not self.has_secrets:
            missing.append("LOCAL_ACCOUNTS: needs BETTER_AUTH_SECRET, which signs the tokens")
        if self.has_keys and not (self.issuers and self.audiences):
            missing.append("JWT_ISSUER, JWT_AUDIENCE: must be given where BETTER_AUTH_URL is not")
        if self.local_accounts and "HS256" not in self.algorithms:
            missing.append("LOCAL_ACCOUNTS: needs HS256 among JWT_ALGORITHMS")
        if missing:
            raise PydanticCustomError("incomplete", "{sentences}", {"sentences": "\n".join(missing)})
        return self

    @property
    def embedded(self) -> bool:
        """Whether everything is kept in `data_dir`: in development, if no database is configured."""
        return self.environment == "development" and not self.database_url

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'tasks.db'}"

    @property
    def migrates_on_start(self) -> bool:
        if self.migrate_on_start is None:
            return self.resolved_database_url.startswith("sqlite")
        return self.migrate_on_start

    @cached_property
    def secrets(self) -> list[str]:
        """All accepted secrets; the first signs."""
        several = [_unversioned(part) for part in (self.better_auth_secrets or "").split(",") if part]
        single = [self.better_auth_secret] if self.better_auth_secret else []
        return several + single or ([_embedded_secret(self.data_dir)] if self.embedded else [])

    @property
    def has_secrets(self) -> bool:
        return bool(self.embedded or self.better_auth_secret or self.better_auth_secrets)

    @property
    def keeps_accounts(self) -> bool:
        """Whether this service keeps local accounts."""
        if self.local_accounts is None:
            return self.unconfigured
        return self.local_accounts

    @property
    def unconfigured(self) -> bool:
        """Whether everything is embedded and no setting names a secret or an issuer."""
        said = self.better_auth_secret or self.better_auth_secrets or self.has_keys
        return self.embedded and not said and "HS256" in self.algorithms

    @cached_property
    def cursor_secrets(self) -> list[str]:
        """The secrets that encrypt cursors; every process must have the same."""
        if self.cursor_secret:
            return [self.cursor_secret]
        return self.secrets or [_stretched(self.resolved_database_url)]

    @property
    def algorithms(self) -> frozenset[str]:
        return _listed(self.jwt_algorithms) or _ALGORITHMS

    @property
    def has_keys(self) -> bool:
        """Whether tokens that are signed with an issuer's private key are accepted."""
        return bool(self.better_auth_url or self.jwks_url or self.jwks)

    @property
    def resolved_jwks_url(self) -> str | None:
        return self.jwks_url or (f"{self.better_auth_url}/api/auth/jwks" if self.better_auth_url else None)

    @property
    def issuers(self) -> frozenset[str]:
        """The accepted values of `iss` in tokens that are signed with the issuer's keys."""
        return self.given_issuers or self._better_auth_origin

    @property
    def audiences(self) -> frozenset[str]:
        return self.given_audiences or self._better_auth_origin

    @property
    def given_issuers(self) -> frozenset[str]:
        """The accepted values of `iss` in tokens that are signed with a secret; empty for any or none."""
        return _listed(self.jwt_issuer)

    @property
    def given_audiences(self) -> frozenset[str]:
        return _listed(self.jwt_audience)

    @property
    def own_claims(self) -> dict[str, str]:
        """The claims that a token issued here needs to be accepted here."""
        expected = {"iss": self.given_issuers, "aud": self.given_audiences}
        return {name: min(values) for name, values in expected.items() if values}

    @property
    def _better_auth_origin(self) -> frozenset[str]:
        if not self.better_auth_url:
            return frozenset()
        parts = urlsplit(self.better_auth_url)
        return frozenset({f"{parts.scheme}://{parts.netloc}"})

    @property
    def jwt_expiration_s(self) -> int:
        return _seconds(self.jwt_expiration)

    @property
    def session_max_age_s(self) -> int:
        return _seconds(self.session_max_age)

    @property
    def origins(self) -> list[str]:
        return _origins(self.allowed_origins)

    @property
    def serves_metrics(self) -> bool:
        """Whether `/metrics` is on the main port: without a token in development, for this machine only."""
        local = self.environment == "development" and not self.metrics_port
        return self.metrics and bool(self.metrics_token or local)

    @property
    def hosts(self) -> list[str]:
        """The hosts that a Host header may name; empty for any."""
        hosts = _parts(self.allowed_hosts.lower())
        return [] if "*" in hosts else hosts

    @property
    def proxies(self) -> list[str]:
        return _parts(self.trusted_proxies or "")

    def divided(self, workers: int) -> "Settings":
        """Return the settings of each of *workers*: its share of what one client may open.

        A browser may open all its connections to the same worker, so a share is at least as many.
        """

        def share(limit: int) -> int:
            return max(-(-limit // workers), min(limit, BROWSER_CONNECTIONS))

        return self.model_copy(
            update={
                "max_connections_per_address": share(self.max_connections_per_address),
                "max_streams_per_user": share(self.max_streams_per_user),
            }
        )

    @property
    def resolved_log_level(self) -> str:
        return "debug" if self.debug else self.log_level

    @property
    def resolved_log_format(self) -> str:
        return self.log_format or ("json" if self.environment == "production" else "console")


class _Environment(BaseSettings, Settings):
    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")


def load_settings() -> Settings:
    """Read the environment and `.env`; on a mistake print a sentence for each and exit with code 2."""
    try:
        settings = _Environment()
    except OSError as error:
        refuse([f".env: cannot be read: {error.strerror}"])
    except ValidationError as error:
        refuse([sentence for mistake in error.errors() for sentence in _sentences(mistake)])
    except UnicodeDecodeError:
        refuse([".env: is not UTF-8"])
    try:
        _ = settings.secrets  # creates the embedded secret, if it is used
    except OSError as error:
        refuse([f"DATA_DIR: {error.filename} cannot be used: {error.strerror}"])
    return settings


def refuse(sentences: list[str]) -> NoReturn:
    """Print *sentences* for the operator and exit with code 2; a traceback would not help."""
    for sentence in sentences:
        print(sentence, file=sys.stderr)  # noqa: T201 - logging is not set up yet
    raise SystemExit(2)


def _sentences(mistake: object) -> list[str]:
    assert isinstance(mistake, dict)  # noqa: S101 - for the type checker
    if mistake["type"] == "incomplete":
        return str(mistake["msg"]).splitlines()
    name = str(mistake["loc"][0]).upper()
    if mistake["type"] in ("bool_type", "bool_parsing"):
        return [f"{name}: must be true or false"]
    clause = re.sub(r"^Input should be", "must be", str(mistake["msg"]))
    return [f"{name}: {clause}"]


def _stretched(database_url: str) -> str:
    """Return a secret that all processes of one database share; guessing the password from it is slow."""
    # 16 MiB and some 50 ms for each guess (RFC 7914); the salt is fixed, so that all processes agree.
    return hashlib.scrypt(database_url.encode(), salt=b"task-backend:cursors", n=2**14, r=8, p=1).hex()


def _embedded_secret(data_dir: Path) -> str:
    """Return the secret of the embedded mode, made once and readable by its owner only."""
    path = data_dir / "secret"
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=data_dir) as draft:  # of mode 600
            draft.write(secrets.token_urlsafe(32))
            draft.flush()
            os.fsync(draft.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first, and its secret is used
                os.link(draft.name, path)
    secret = path.read_text(errors="replace").strip()
    if len(secret) < SECRET_MIN or secret == _PUBLIC_SECRET:
        raise OSError(errno.EINVAL, "it holds no secret; remove it and a new one is made", str(path))
    return secret

import contextlib
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from database import urls
from tests.postgres import Server
from tests.strategies import BOUNDED, near_misses

NEON = (
    "postgresql://user:p%40ss@ep-cool-name-123-pooler.eu-central-1.aws.neon.tech/neondb"
    "?sslmode=require&channel_binding=require"
)
HOST = "db.example.com"


def arguments(url: str) -> dict[str, Any]:
    return urls.parse(url).arguments


def with_parameters(parameters: str) -> dict[str, Any]:
    return arguments(f"postgresql://user:hunter2@{HOST}/tasks?{parameters}")


def test_neons_url_is_read_as_it_comes() -> None:
    target = urls.parse(NEON)

    context = target.arguments["ssl"]
    assert target.pooled
    assert target.arguments == {
        "host": "ep-cool-name-123-pooler.eu-central-1.aws.neon.tech",
        "port": 5432,
        "user": "user",
        "password": "p@ss",
        "database": "neondb",
        "timeout": None,
        "ssl": context,
        "direct_tls": None,
        "statement_cache_size": 0,
        "server_settings": {},
    }
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgres+asyncpg", "postgresql+asyncpg", "PostgreSQL"]
)
def test_the_scheme_may_be_written_in_several_ways(scheme: str) -> None:
    assert arguments(f"{scheme}://user@{HOST}/tasks")["host"] == HOST


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        (HOST, HOST, 5432),
        (f"{HOST}:6543", HOST, 6543),
        (f"{HOST}:", HOST, 5432),
        ("DB.Example.com", HOST, 5432),
        ("127.0.0.1:5433", "127.0.0.1", 5433),
        ("[::1]", "::1", 5432),
        ("[2001:db8::7]:5433", "2001:db8::7", 5433),
        ("%2Fvar%2Frun%2FPostgreSQL", "/var/run/PostgreSQL", 5432),
    ],
)
def test_the_host_and_port_are_read(address: str, host: str, port: int) -> None:
    read = arguments(f"postgresql://user:hunter2@{address}/tasks")

    assert (read["host"], read["port"]) == (host, port)


def test_the_host_parameter_may_name_a_unix_socket() -> None:
    read = arguments("postgresql:///tasks?host=/var/run/postgresql")

    assert (read["host"], read["database"], read["user"]) == ("/var/run/postgresql", "tasks", None)


@pytest.mark.parametrize(
    ("login", "user", "password"),
    [
        ("", None, None),
        ("user@", "user", None),
        ("user:@", "user", None),
        ("user:hunter2@", "user", "hunter2"),
        ("user:p%40ss@", "user", "p@ss"),
        ("user:%3A%2F%3F%23%5B%5D%40%25@", "user", ":/?#[]@%"),
        ("user:a:b@", "user", "a:b"),
        ("user:p@ss@", "user", "p@ss"),
        ("user:a+b@", "user", "a+b"),
        ("user:100%@", "user", "100%"),
        ("user:%C3%A9%F0%9F%98%80@", "user", "é😀"),
        ("alice%40example.com:x@", "alice@example.com", "x"),
        ("neondb_owner:npg_AbC123@", "neondb_owner", "npg_AbC123"),
    ],
)
def test_the_login_is_percent_decoded(login: str, user: str | None, password: str | None) -> None:
    read = arguments(f"postgresql://{login}{HOST}/tasks")

    assert (read["user"], read["password"], read["host"]) == (user, password, HOST)


@pytest.mark.parametrize(
    ("path", "database"),
    [("/tasks", "tasks"), ("/my%20tasks", "my tasks"), ("/%C3%A9", "é"), ("/", None), ("", None)],
)
def test_the_database_is_percent_decoded(path: str, database: str | None) -> None:
    assert arguments(f"postgresql://user@{HOST}{path}")["database"] == database


@pytest.mark.parametrize(
    ("url", "pooled"),
    [
        (NEON, True),
        (NEON.replace("-pooler", ""), False),
        (NEON.replace("-pooler", "-POOLER"), True),
        ("postgresql://user@my-pooler/tasks", True),
        ("postgresql://user@pooler.example.com/tasks", False),
        ("postgresql://user@db.my-pooler.example.com/tasks", False),
        ("postgresql://user@db-pooler-1.example.com/tasks", False),
        ("postgresql://user-pooler:x-pooler@db/tasks-pooler", False),
        ("postgresql://user@db/tasks?pgbouncer=true", True),
        ("postgresql://user@db/tasks?pgbouncer=1", True),
        ("postgresql://user@db/tasks?pgbouncer=False", False),
        ("postgresql://user@db/tasks?pgbouncer=", False),
    ],
)
def test_a_pooler_url_disables_the_statement_cache(url: str, pooled: bool) -> None:
    target = urls.parse(url)

    assert target.pooled is pooled
    assert (target.arguments["statement_cache_size"] == 0) is pooled


@pytest.mark.parametrize(
    ("parameters", "timeout_s"),
    [
        ("", None),
        ("connect_timeout=10", 10.0),
        ("connect_timeout=2.5", 2.5),
        ("connect_timeout=", None),
        ("connect_timeout=0", None),
        ("connect_timeout=-1", None),
    ],
)
def test_connect_timeout_is_read(parameters: str, timeout_s: float | None) -> None:
    assert with_parameters(parameters)["timeout"] == timeout_s


@pytest.mark.parametrize(
    ("parameters", "settings"),
    [
        ("", {}),
        ("application_name=", {}),
        ("application_name=my%20tasks", {"application_name": "my tasks"}),
        ("options=endpoint%3Dep-cool-name-123", {"options": "endpoint=ep-cool-name-123"}),
        ("options=-c%20search_path%3Dtasks", {"options": "-c search_path=tasks"}),
        ("options=project%3Da&application_name=b", {"options": "project=a", "application_name": "b"}),
        ("connect_timeout=3&sslmode=disable&pgbouncer=true", {}),
    ],
)
def test_application_name_and_options_become_server_settings(
    parameters: str, settings: dict[str, str]
) -> None:
    assert with_parameters(parameters)["server_settings"] == settings


def test_target_session_attrs_is_kept() -> None:
    assert with_parameters("target_session_attrs=read-write")["target_session_attrs"] == "read-write"
    assert "target_session_attrs" not in with_parameters("")


def test_sslnegotiation_direct_is_read() -> None:
    assert with_parameters("sslmode=require&sslnegotiation=direct")["direct_tls"] is True
    assert with_parameters("sslmode=require&sslnegotiation=postgres")["direct_tls"] is None


async def test_asyncpg_accepts_the_parsed_arguments(postgres: Server) -> None:
    parameters = "sslmode=prefer&connect_timeout=3&application_name=my%20tasks&options=-c%20work_mem%3D7MB"
    read = arguments(f"{postgres.url}?{parameters}&pgbouncer=true&target_session_attrs=read-write")

    connection = await asyncpg.connect(**read)

    try:
        assert await connection.fetchval("SHOW application_name") == "my tasks"
        assert await connection.fetchval("SHOW work_mem") == "7MB"
    finally:
        await connection.close()


class Authority:
    """A certificate authority whose files are in *folder*."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.file = folder / f"{name}.pem"
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = (
            _certificate(self._name, self._key, self._name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str) -> Path:
        """Write a certificate for *name* and its key, as `.pem` and `.key`, and return the former."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _certificate(_name(name), key, self._name)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self._folder / f"{self.file.stem}-{name}.pem"
        file.write_bytes(certificate.public_bytes(Encoding.PEM))
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.with_suffix(".key").write_bytes(secret)
        return file


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, issuer: x509.Name
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def public(folder: Path) -> Authority:
    return Authority(folder, "public")


@pytest.fixture(scope="module")
def private(folder: Path) -> Authority:
    return Authority(folder, "private")


@pytest.fixture
def system_trusts_public(monkeypatch: pytest.MonkeyPatch, public: Authority, folder: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(public.file))
    monkeypatch.setenv("SSL_CERT_DIR", str(folder / "none"))


def server(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    return context


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Run a TLS handshake in memory.

    Raises:
        ssl.SSLError: one side refused the other.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=HOST),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(5):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


def accepts(client: ssl.SSLContext, server: ssl.SSLContext) -> bool:
    try:
        shake_hands(client, server)
    except ssl.SSLError:
        return False
    return True


@pytest.mark.parametrize(
    ("parameters", "argument"),
    [
        ("", "prefer"),
        ("sslmode=", "prefer"),
        ("sslmode=prefer", "prefer"),
        ("sslmode=allow", "prefer"),
        ("sslmode=disable", False),
    ],
)
def test_tls_that_is_not_required_is_left_to_the_driver(parameters: str, argument: object) -> None:
    assert with_parameters(parameters)["ssl"] == argument


@pytest.mark.parametrize(
    ("parameters", "verify_mode", "check_hostname"),
    [
        ("sslmode=require", ssl.CERT_NONE, False),
        ("sslmode=verify-ca", ssl.CERT_REQUIRED, False),
        ("sslmode=verify-full", ssl.CERT_REQUIRED, True),
        ("sslmode=require&channel_binding=prefer", ssl.CERT_NONE, False),
        ("sslmode=require&channel_binding=disable", ssl.CERT_NONE, False),
        ("sslmode=require&channel_binding=require", ssl.CERT_REQUIRED, True),
        ("channel_binding=require", ssl.CERT_REQUIRED, True),
        ("sslrootcert=system", ssl.CERT_REQUIRED, True),
        ("sslmode=disable&sslmode=verify-full", ssl.CERT_REQUIRED, True),
    ],
)
def test_each_sslmode_checks_what_libpq_checks(
    parameters: str, verify_mode: ssl.VerifyMode, check_hostname: bool
) -> None:
    context = with_parameters(parameters)["ssl"]

    assert isinstance(context, ssl.SSLContext)
    assert (context.verify_mode, context.check_hostname) == (verify_mode, check_hostname)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


EVERY = {"public", "public misnamed", "private", "private misnamed"}


@pytest.mark.parametrize(
    ("parameters", "accepted"),
    [
        ("sslmode=require", EVERY),
        ("sslmode=require&sslrootcert=", EVERY),
        ("sslmode=require&channel_binding=prefer", EVERY),
        ("sslmode=require&channel_binding=require", {"public"}),
        ("sslmode=disable&channel_binding=require", {"public"}),
        ("sslmode=verify-ca", {"public", "public misnamed"}),
        ("sslmode=verify-full", {"public"}),
        ("sslmode=verify-full&sslrootcert=system", {"public"}),
        ("sslmode=require&sslrootcert=system", {"public"}),
        ("sslmode=verify-full&sslrootcert={public}", {"public"}),
        ("sslmode=require&sslrootcert={private}", {"private", "private misnamed"}),
        ("sslmode=verify-ca&sslrootcert={private}", {"private", "private misnamed"}),
        ("sslmode=verify-full&sslrootcert={private}", {"private"}),
        ("sslmode=require&channel_binding=require&sslrootcert={private}", {"private"}),
    ],
)
@pytest.mark.usefixtures("system_trusts_public")
def test_a_server_is_trusted_as_sslmode_and_sslrootcert_say(
    public: Authority, private: Authority, parameters: str, accepted: set[str]
) -> None:
    servers = {
        f"{kind}{suffix}": server(authority.issue(name))
        for kind, authority in (("public", public), ("private", private))
        for suffix, name in (("", HOST), (" misnamed", "elsewhere.example.com"))
    }

    context = with_parameters(parameters.format(public=public.file, private=private.file))["ssl"]

    assert {name for name, server in servers.items() if accepts(context, server)} == accepted


@pytest.mark.parametrize(
    "parameters",
    [
        "sslcert={file}&sslkey={key}",
        "sslcert={both}",
        "sslcert=~/client.pem&sslkey={key}",
        "sslcert=~/client.pem&sslkey=~/client.key",
    ],
)
def test_sslcert_is_presented_to_the_server(
    private: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch, parameters: str
) -> None:
    asking = server(private.issue(HOST))
    asking.verify_mode = ssl.CERT_REQUIRED
    asking.load_verify_locations(private.file)
    file = private.issue("client").rename(folder / "client.pem")
    key = (folder / "private-client.key").rename(folder / "client.key")
    both = folder / "both.pem"
    both.write_bytes(file.read_bytes() + key.read_bytes())
    monkeypatch.setenv("HOME", str(folder))

    shown = with_parameters("sslmode=require&" + parameters.format(file=file, key=key, both=both))["ssl"]

    assert accepts(shown, asking)
    assert not accepts(with_parameters("sslmode=require")["ssl"], asking)


def test_sslrootcert_may_be_in_the_home_folder(
    private: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))

    context = with_parameters(f"sslmode=verify-full&sslrootcert=~/{private.file.name}")["ssl"]

    assert accepts(context, server(private.issue(HOST)))


NOT_A_URL = "is not a valid URL"
NO_HOST = "names no host"
UNKNOWN = "has a parameter that is not known: "
NOT_A_MODE = "has an sslmode that is not one of disable, allow, prefer, require, verify-ca, verify-full"
NOT_SECONDS = "has a connect_timeout that is not a number of seconds"


def mistake_in(url: str) -> str:
    with pytest.raises(ValueError, match=r"^(is|has|names|must name) ") as mistake:
        urls.parse(url)
    return str(mistake.value)


def mistake_in_parameters(parameters: str) -> str:
    return mistake_in(f"postgresql://user:hunter2@{HOST}/tasks?{parameters}")


@pytest.mark.parametrize(
    ("url", "clause"),
    [
        ("postgresql://user:hunter2@[::1/tasks", NOT_A_URL),
        ("postgresql://user:hunter2@::1]/tasks", NOT_A_URL),
        ("postgresql://user:hunter2@db:port/tasks", NOT_A_URL),
        ("postgresql://user:hunter2@db:65536/tasks", NOT_A_URL),
        ("postgresql://user:hunter2@db:-1/tasks", NOT_A_URL),
        ("postgresql://user:hunter2@db:5432,db2:5432/tasks", NOT_A_URL),
        ("postgresql://user:hunter2#@db/tasks", NOT_A_URL),
        ("postgresql://user:hunter2/@db/tasks", NOT_A_URL),
        ("postgresql://user:hunter2?@db/tasks", NOT_A_URL),
        ("postgresql://user:[hunter2@db/tasks", NOT_A_URL),
        ("postgresql://user:hunter2@/tasks", NO_HOST),
        ("postgresql://user:hunter2@:5432/tasks", NO_HOST),
        ("postgresql:///tasks", NO_HOST),
        ("postgresql://", NO_HOST),
        ("postgresql:", NO_HOST),
        ("postgresql://user:hunter2@db/tasks?sslmod=require", f"{UNKNOWN}sslmod"),
        ("postgresql://user:hunter2@db/tasks?SSLMODE=require", f"{UNKNOWN}SSLMODE"),
        ("postgresql://user:hunter2@db/tasks?password=hunter2", f"{UNKNOWN}password"),
        ("postgresql://user:hunter2@db/tasks?schema=a&pool=5&sslmode=x", f"{UNKNOWN}pool, schema"),
        ("postgresql://user:hunter2@db/tasks?sslmode=REQUIRE", NOT_A_MODE),
        ("postgresql://user:hunter2@db/tasks?sslmode=true", NOT_A_MODE),
        ("postgresql://user:hunter2@db/tasks?sslmode=verify_full", NOT_A_MODE),
        ("postgresql://user:hunter2@db/tasks?sslmode=hunter2&channel_binding=require", NOT_A_MODE),
        ("postgresql://user:hunter2@db/tasks?connect_timeout=soon", NOT_SECONDS),
        ("postgresql://user:hunter2@one,two/tasks", "must name one host"),
        (
            "postgresql://user:hunter2@db/tasks?sslnegotiation=x",
            "has an sslnegotiation that is not one of postgres, direct",
        ),
        (
            "postgresql://user:hunter2@db/tasks?channel_binding=x",
            "has a channel_binding that is not one of disable, prefer, require",
        ),
        (
            "postgresql://user:hunter2@db/tasks?target_session_attrs=x",
            "has a target_session_attrs that is not one of "
            "any, read-write, read-only, primary, standby, prefer-standby",
        ),
        ("postgresql://user:hunter2@db/tasks?connect_timeout=10s", NOT_SECONDS),
    ],
)
def test_an_invalid_url_is_reported_without_the_password(url: str, clause: str) -> None:
    assert mistake_in(url) == clause
    assert "hunter2" not in clause


@pytest.mark.parametrize("password", ["?hunter2", "12?hunter2", "12/a?hunter2", "12?a&hunter2&b"])
def test_a_password_that_looks_like_parameters_is_not_repeated(password: str) -> None:
    assert "hunter2" not in mistake_in(f"postgresql://user:{password}@{HOST}/tasks")


@pytest.mark.parametrize("password", ["#hunter2", "12#hunter2", "12/#hunter2"])
def test_a_password_with_a_number_sign_is_refused(password: str) -> None:
    assert "hunter2" not in mistake_in(f"postgresql://user:{password}@{HOST}/tasks")


@pytest.mark.parametrize("value", ["inf", "Infinity", "1e999"])
def test_an_infinite_connect_timeout_is_refused(value: str) -> None:
    assert mistake_in_parameters(f"connect_timeout={value}") == NOT_SECONDS


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert"])
@pytest.mark.parametrize("problem", ["a folder", "empty", "not a certificate", "a key"])
def test_an_unreadable_certificate_file_is_reported(
    private: Authority, tmp_path: Path, name: str, problem: str
) -> None:
    make: dict[str, Callable[[Path], object]] = {
        "a folder": Path.mkdir,
        "empty": Path.touch,
        "not a certificate": lambda path: path.write_bytes(b"\xff\0certificate"),
        "a key": lambda path: path.write_bytes(private.issue("x").with_suffix(".key").read_bytes()),
    }
    file = tmp_path / "file.pem"
    make[problem](file)

    for path in (file, file.with_name("absent.pem")):
        assert (
            mistake_in_parameters(f"sslmode=verify-full&{name}={path}")
            == f"has an {name} that cannot be read"
        )


def test_an_sslkey_of_another_certificate_is_reported(private: Authority) -> None:
    file, other = private.issue("one"), private.issue("other").with_suffix(".key")

    for key in (other, other.with_name("absent.key")):
        clause = mistake_in_parameters(f"sslmode=require&sslcert={file}&sslkey={key}")
        assert clause == "has an sslcert that cannot be read"


# Characters that passwords often contain unescaped, and unlikely ones.
ODD_TEXT = st.text(st.sampled_from("a1:/?#[]@%&=+,; \n\0\ud800é") | st.characters(codec=None), max_size=8)
TEXT = ODD_TEXT | ODD_TEXT.map(lambda text: quote(text, safe="", errors="replace"))
PASSWORDS = st.builds("{}hunter2{}".format, TEXT | st.sampled_from(["1?", "1/?", "1/?a&", "1#"]), TEXT)
ADDRESSES = (
    st.sampled_from([HOST, HOST, HOST, "[::1]:5432", "[::1", "a,b", "%2Frun", "h:65536", "h:x"]) | TEXT
)
VALUES: dict[str, list[str]] = {
    "sslmode": ["require", "verify-full", "disable", ""],
    "sslrootcert": ["system", "/", "~nobody-here/x", "%00", "a" * 5000],
    "sslcert": ["/", "~nobody-here/x", "%00"],
    "sslnegotiation": ["direct"],
    "channel_binding": ["require"],
    "connect_timeout": ["10", "-1", "1e999", "nan", "soon"],
    "options": ["-c%20x=y"],
    "pgbouncer": ["true"],
}
PARAMETERS = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) for name, values in VALUES.items()}
).map(lambda parameters: "&".join(f"{name}={value}" for name, value in parameters.items()))
URLS = st.builds(
    "postgresql://{}:{}@{}/{}?{}{}".format,
    TEXT,
    PASSWORDS,
    ADDRESSES,
    TEXT,
    PARAMETERS,
    st.just("") | TEXT,
)


@BOUNDED
@given(
    url=URLS | near_misses("postgresql://user:hunter2@db.example.com:5432/tasks?sslmode=require&options=x")
)
def test_whatever_a_url_is_its_mistake_is_told_without_the_password(url: str) -> None:
    with contextlib.suppress(ValueError):
        urls.parse(url)
        return

    assert "hunter2" not in mistake_in(url)

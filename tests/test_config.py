import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import limits
import pytest

import config
from auth import tokens
from config import Settings, load_settings
from tests.conftest import SECRET

ROOT = Path(config.__file__).parent
OLDER = "a-secret-that-only-the-tests-know-0000"
PUBLIC_SECRET = "better-auth-secret-12345678901234567890"
DATABASE_URL = "postgresql://user:hunter2@db.example.com/tasks"

TOO_SHORT = "must be at least 32 characters"
NOT_VERSIONED = "must look like 2:newest,1:older"
PUBLIC = "is Better Auth's public default; make one of your own"
NOT_A_DURATION = "must be a number and a unit: 15m, 24h or 7d"
NOT_AN_INTEGER = "must be a valid integer, unable to parse string as an integer"
NOT_A_BOOLEAN = "must be true or false"
NOT_ORIGINS = "must be origins like https://app.example.com, separated by commas"
NOT_AN_ADDRESS = "must be an address like https://app.example.com"
NOT_A_RATE = "must be off or look like 600/minute or 100/10 seconds"
NOT_REDIS = "must look like redis://user:password@host:6379/0, or rediss://"
NOT_NETWORKS = "must be addresses or networks like 10.0.0.0/8, separated by commas"
NOT_HOSTS = "must be names without a port, like api.example.com or *.example.com, separated by commas"
NO_DATABASE = "DATABASE_URL: must be given in production"
NO_SECRET = (
    "BETTER_AUTH_SECRET: must be given, the same as your front end's, or BETTER_AUTH_URL; "
    "only the embedded database in development makes a secret by itself"
)

RATES = ("RATE_LIMIT", "RATE_LIMIT_ANONYMOUS")
NO_RATES = ("600", "0/minute", "-1/minute", "many/minute", "600/fortnight", "600/minute;5/second", "on")

Refusal = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, in an environment without settings."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Load invalid settings from an environment and return the error messages."""

    def load(**environment: str) -> list[str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            load_settings()
        printed = capsys.readouterr()
        assert end.value.code == 2
        assert printed.out == ""
        return printed.err.splitlines()

    return load


def settings_of(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def run(code: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "stderr"),
    [
        ({"PORT": "eighty", "BETTER_AUTH_SECRET": "hunter2"}, {f"BETTER_AUTH_SECRET: {TOO_SHORT}", "PORT: "}),
        ({"ENVIRONMENT": "production"}, {NO_DATABASE, NO_SECRET}),
        ({"DATABASE_URL": DATABASE_URL}, {NO_SECRET}),
    ],
)
def test_an_invalid_setting_ends_the_process_without_a_traceback(
    folder: Path, environment: dict[str, str], stderr: set[str]
) -> None:
    done = run("import config; config.load_settings()", folder, **environment)

    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", len(stderr))
    assert all(any(line.startswith(start) for line in lines) for start in stderr)
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr


def test_no_setting_is_required(folder: Path) -> None:
    done = run("import config; print(config.load_settings().embedded)", folder)

    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["data", "data/secret"]


@pytest.mark.parametrize(
    ("name", "value", "clause"),
    [
        ("BETTER_AUTH_SECRET", "x", TOO_SHORT),
        ("BETTER_AUTH_SECRET", "x" * 31, TOO_SHORT),
        ("BETTER_AUTH_SECRET", PUBLIC_SECRET, PUBLIC),
        ("CURSOR_SECRET", "x" * 31, TOO_SHORT),
        ("CURSOR_SECRET", PUBLIC_SECRET, PUBLIC),
        ("BETTER_AUTH_SECRETS", SECRET, NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f"{SECRET},{OLDER}", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f"new:{SECRET}", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f"-1:{SECRET}", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f":{SECRET}", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", "1:", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", ",", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f"2:{SECRET},", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f"2:{SECRET},,1:{OLDER}", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f"2:{SECRET},1", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", f"2:{SECRET}\n1:{OLDER}", NOT_VERSIONED),
        ("BETTER_AUTH_SECRETS", "1:short", TOO_SHORT),
        ("BETTER_AUTH_SECRETS", f"2:{SECRET},1:short", TOO_SHORT),
        ("BETTER_AUTH_SECRETS", f"2:{SECRET},1:{PUBLIC_SECRET}", PUBLIC),
        ("JWT_EXPIRATION", "7", NOT_A_DURATION),
        ("JWT_EXPIRATION", "d", NOT_A_DURATION),
        ("JWT_EXPIRATION", "0d", NOT_A_DURATION),
        ("JWT_EXPIRATION", "07d", NOT_A_DURATION),
        ("JWT_EXPIRATION", "-7d", NOT_A_DURATION),
        ("JWT_EXPIRATION", "1.5h", NOT_A_DURATION),
        ("JWT_EXPIRATION", "7w", NOT_A_DURATION),
        ("JWT_EXPIRATION", "7D", NOT_A_DURATION),
        ("JWT_EXPIRATION", "7 d", NOT_A_DURATION),
        ("JWT_EXPIRATION", "7d\n", NOT_A_DURATION),
        ("JWT_EXPIRATION", "1d12h", NOT_A_DURATION),
        ("JWT_EXPIRATION", "P7D", NOT_A_DURATION),
        ("JWT_EXPIRATION", "1000000000d", NOT_A_DURATION),
        ("JWT_EXPIRATION", "never", NOT_A_DURATION),
        ("PORT", "eighty", NOT_AN_INTEGER),
        ("PORT", "80.5", NOT_AN_INTEGER),
        ("PORT", "tcp://10.0.0.7:8000", NOT_AN_INTEGER),
        ("PORT", "-1", "must be greater than or equal to 0"),
        ("PORT", "65536", "must be less than or equal to 65535"),
        ("TRASH_DAYS", "-1", "must be greater than or equal to 0"),
        ("SYNC_DAYS", "4000", "must be less than or equal to 3650"),
        ("DATABASE_POOL_SIZE", "many", NOT_AN_INTEGER),
        ("DATABASE_POOL_SIZE", "0", "must be greater than or equal to 1"),
        ("DATABASE_POOL_SIZE", "1001", "must be less than or equal to 1000"),
        ("DEBUG", "maybe", NOT_A_BOOLEAN),
        ("DEBUG", "2", NOT_A_BOOLEAN),
        ("ACCESS_LOG", "quiet", NOT_A_BOOLEAN),
        ("MIGRATE_ON_START", "always", NOT_A_BOOLEAN),
        ("LOCAL_ACCOUNTS", "some", NOT_A_BOOLEAN),
        ("ALLOWED_ORIGINS", "https://app.example.com/app", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "http://[::1", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "http://h:port", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "https://u:p@h", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "https://a b", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "ftp://x", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "https://*.example.com", NOT_ORIGINS),
        ("BETTER_AUTH_SECRET", " " * 40, TOO_SHORT),
        ("BETTER_AUTH_SECRET", "\udcff" * 40, "must be UTF-8"),
        ("ALLOWED_ORIGINS", "https://app.example.com/?x=1", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "https://app.example.com#top", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "app.example.com", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "localhost:3000", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "//app.example.com", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "https://", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "null", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", '["https://app.example.com"]', NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "https://a.example.com https://b.example.com/x", NOT_ORIGINS),
        ("ALLOWED_ORIGINS", "https://a.example.com,https://b.example.com/x", NOT_ORIGINS),
        ("ENVIRONMENT", "staging", "must be 'development' or 'production'"),
        ("LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning', 'error' or 'critical'"),
        ("DELETE_STATUS", "202", "must be '204' or '200'"),
        ("LOG_FORMAT", "xml", "must be 'console' or 'json'"),
        ("DOCS", "perhaps", NOT_A_BOOLEAN),
        *((name, value, NOT_A_RATE) for name in RATES for value in NO_RATES),
        ("RATE_LIMIT_STORAGE_URL", "memory://", NOT_REDIS),
        ("RATE_LIMIT_STORAGE_URL", "redis://", NOT_REDIS),
        ("RATE_LIMIT_STORAGE_URL", "redis://host:port", NOT_REDIS),
        ("RATE_LIMIT_STORAGE_URL", "redis://host/zero", NOT_REDIS),
        ("RATE_LIMIT_STORAGE_URL", "redis://host/0?socket_timeout=9", NOT_REDIS),
        ("TRUSTED_PROXIES", "*", NOT_NETWORKS),
        ("TRUSTED_PROXIES", "proxy.example.com", NOT_NETWORKS),
        ("TRUSTED_PROXIES", "127.0.0.1,10.0.0.1/8", NOT_NETWORKS),
        ("ALLOWED_HOSTS", ",", NOT_HOSTS),
        ("ALLOWED_HOSTS", "https://api.example.com", NOT_HOSTS),
        ("ALLOWED_HOSTS", "api.example.com:8000", NOT_HOSTS),
        ("ALLOWED_HOSTS", "api.*.com", NOT_HOSTS),
        ("ALLOWED_HOSTS", "::1", NOT_HOSTS),
    ],
)
def test_an_invalid_setting_is_reported_by_name(refusal: Refusal, name: str, value: str, clause: str) -> None:
    assert refusal(**{name: value}) == [f"{name}: {clause}"]


def test_every_invalid_setting_is_reported(refusal: Refusal) -> None:
    sentences = refusal(PORT="eighty", DEBUG="maybe", LOG_LEVEL="loud", BETTER_AUTH_SECRET="x")

    assert [sentence.partition(":")[0] for sentence in sorted(sentences)] == [
        "BETTER_AUTH_SECRET",
        "DEBUG",
        "LOG_LEVEL",
        "PORT",
    ]


@pytest.mark.parametrize(
    ("environment", "sentences"),
    [
        ({"ENVIRONMENT": "production"}, [NO_DATABASE, NO_SECRET]),
        ({"ENVIRONMENT": "Production"}, [NO_DATABASE, NO_SECRET]),
        ({"ENVIRONMENT": "production", "BETTER_AUTH_SECRET": SECRET}, [NO_DATABASE]),
        ({"ENVIRONMENT": "production", "BETTER_AUTH_SECRETS": f"1:{SECRET}"}, [NO_DATABASE]),
        ({"ENVIRONMENT": "production", "DATABASE_URL": DATABASE_URL}, [NO_SECRET]),
        (
            {"ENVIRONMENT": "production", "DATABASE_URL": "", "BETTER_AUTH_SECRET": ""},
            [NO_DATABASE, NO_SECRET],
        ),
        ({"DATABASE_URL": DATABASE_URL}, [NO_SECRET]),
        ({"DATABASE_URL": "sqlite:///tasks.db"}, [NO_SECRET]),
        ({"DATABASE_URL": DATABASE_URL, "BETTER_AUTH_SECRET": ""}, [NO_SECRET]),
    ],
)
def test_a_configured_database_requires_a_secret_and_production_both(
    refusal: Refusal, folder: Path, environment: dict[str, str], sentences: list[str]
) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "secret").write_text(SECRET)

    assert refusal(**environment) == sentences


@pytest.mark.parametrize(
    "environment",
    [
        {"BETTER_AUTH_SECRET": "hunter2"},
        {"BETTER_AUTH_SECRETS": "hunter2"},
        {"CURSOR_SECRET": "hunter2"},
        {"BETTER_AUTH_SECRETS": f"2:{SECRET}-hunter2,1:hunter2"},
        {"BETTER_AUTH_SECRET": f"{SECRET}-hunter2", "PORT": "eighty"},
        {"DATABASE_URL": DATABASE_URL},
        {"DATABASE_URL": DATABASE_URL, "PORT": "eighty"},
        {"BETTER_AUTH_SECRET": f"{SECRET}-hunter2", "ENVIRONMENT": "production"},
        {"BETTER_AUTH_SECRETS": f"1:{SECRET}-hunter2", "ENVIRONMENT": "production"},
    ],
)
def test_no_settings_error_contains_a_secret(refusal: Refusal, environment: dict[str, str]) -> None:
    sentences = refusal(**environment)

    assert sentences
    assert "hunter2" not in "".join(sentences)


def test_settings_do_not_show_their_secrets() -> None:
    settings = Settings(
        database_url=DATABASE_URL,
        better_auth_secret=f"{SECRET}-hunter2",
        better_auth_secrets=f"1:{SECRET}-hunter2",
        cursor_secret=f"{SECRET}-hunter2",
    )
    assert len(settings.secrets) == 2

    assert "hunter2" not in f"{settings} {settings!r}"


def test_an_empty_value_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(monkeypatch, **{name.upper(): "" for name in Settings.model_fields})

    assert settings.model_dump() == Settings().model_dump()


def test_an_empty_value_in_the_env_file_counts_as_unset(folder: Path) -> None:
    (folder / ".env").write_text("".join(f"{name.upper()}=\n" for name in Settings.model_fields))

    assert load_settings().model_dump() == Settings().model_dump()


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (f"BETTER_AUTH_SECRET={SECRET}\n", SECRET),
        (f"BETTER_AUTH_SECRET='{SECRET}'\r\nPORT=8000\r\n", SECRET),
        (f'# the same as the front end\'s\nexport BETTER_AUTH_SECRET="{SECRET}"', SECRET),
        (f"\ufeffBETTER_AUTH_SECRET={SECRET}\n", SECRET),
        (f"SOMEBODY_ELSES=1\nBETTER_AUTH_SECRET={SECRET}#é\n", f"{SECRET}#é"),
    ],
)
def test_the_env_file_is_read(folder: Path, content: str, secret: str) -> None:
    (folder / ".env").write_bytes(content.encode())

    assert load_settings().secrets == [secret]


def test_the_environment_overrides_the_env_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / ".env").write_text("PORT=7001\nHOST=0.0.0.0\nLOG_LEVEL=error\n")

    settings = settings_of(monkeypatch, PORT="7002", LOG_LEVEL="")

    assert (settings.port, settings.host, settings.log_level) == (7002, "0.0.0.0", "error")


def test_an_invalid_setting_in_the_env_file_is_reported(refusal: Refusal, folder: Path) -> None:
    (folder / ".env").write_text("PORT=eighty\nBETTER_AUTH_SECRET=hunter2\n")

    assert sorted(refusal()) == [f"BETTER_AUTH_SECRET: {TOO_SHORT}", f"PORT: {NOT_AN_INTEGER}"]


@pytest.mark.parametrize(
    "content", ["PORT=7001\n".encode("utf-16"), f"# é\nBETTER_AUTH_SECRET={SECRET}\n".encode("latin-1")]
)
def test_an_env_file_that_is_not_utf_8_is_reported(refusal: Refusal, folder: Path, content: bytes) -> None:
    (folder / ".env").write_bytes(content)

    assert refusal() == [".env: is not UTF-8"]


def test_settings_built_in_code_ignore_environment_and_env_file(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("PORT", "7001")
    (folder / ".env").write_text("HOST=0.0.0.0\n")

    assert (Settings().port, Settings().host) == (8000, "127.0.0.1")


def test_the_embedded_secret_is_created_once_with_mode_600(folder: Path) -> None:
    data = folder / "deep" / "data"
    before = os.umask(0)
    try:
        (secret,) = Settings(data_dir=data).secrets
    finally:
        os.umask(before)

    assert len(secret) >= config.SECRET_MIN
    assert [path.name for path in data.iterdir()] == ["secret"]
    assert stat.S_IMODE((data / "secret").stat().st_mode) == 0o600
    assert (data / "secret").read_text() == secret
    assert Settings(data_dir=data).secrets == [secret]


def test_embedded_secrets_differ(folder: Path) -> None:
    made = {Settings(data_dir=folder / str(number)).secrets[0] for number in range(20)}

    assert len(made) == 20


def test_the_embedded_secret_outlives_the_process(folder: Path) -> None:
    code = "import config; print(*config.load_settings().secrets)"

    first, second = (run(code, folder).stdout for _ in range(2))

    assert first == second == (folder / "data" / "secret").read_text() + "\n"


@pytest.mark.parametrize("content", [SECRET, f"{SECRET}\n"])
def test_an_existing_embedded_secret_is_kept(folder: Path, content: str) -> None:
    (folder / "secret").write_text(content)

    assert Settings(data_dir=folder).secrets == [SECRET]
    assert (folder / "secret").read_text() == content


@pytest.mark.parametrize("content", ["", "\n", "short", PUBLIC_SECRET, f" {'x' * 31}\n"])
def test_an_invalid_embedded_secret_is_refused(refusal: Refusal, folder: Path, content: str) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "secret").write_text(content)

    assert refusal() == [
        "DATA_DIR: data/secret cannot be used: it holds no secret; remove it and a new one is made"
    ]
    assert (folder / "data" / "secret").read_text() == content


def test_a_data_folder_that_cannot_be_made_is_reported(refusal: Refusal, folder: Path) -> None:
    (folder / "data").touch()

    assert refusal() == ["DATA_DIR: data cannot be used: File exists"]


def test_a_configured_secret_creates_no_secret_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert settings_of(monkeypatch, BETTER_AUTH_SECRET=SECRET).secrets == [SECRET]
    assert list(folder.iterdir()) == []


def test_processes_that_race_to_create_the_secret_agree(folder: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from config import Settings
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(40):
            print(*Settings(data_dir=Path(str(number))).secrets)
        """
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    seen = [racer.communicate()[0].splitlines() for racer in racers]

    made = [(folder / str(number) / "secret").read_text() for number in range(40)]
    assert [racer.returncode for racer in racers] == [0] * 6
    assert seen == [made] * 6
    assert len(set(made)) == 40
    assert {path.name for path in folder.glob("*/*")} == {"secret"}


@pytest.mark.parametrize(
    ("given", "secrets"),
    [
        ({"better_auth_secret": SECRET}, [SECRET]),
        ({"better_auth_secrets": f"1:{SECRET}"}, [SECRET]),
        ({"better_auth_secrets": f"2:{SECRET},1:{OLDER}"}, [SECRET, OLDER]),
        ({"better_auth_secrets": f" 2:{SECRET} , 1:{OLDER} "}, [SECRET, OLDER]),
        ({"better_auth_secrets": f"2:{SECRET}", "better_auth_secret": OLDER}, [SECRET, OLDER]),
        ({"better_auth_secrets": f"1:a:b:{SECRET}"}, [f"a:b:{SECRET}"]),
        ({"better_auth_secret": f"{SECRET},1:é😀"}, [f"{SECRET},1:é😀"]),
        ({"better_auth_secret": "x" * 32}, ["x" * 32]),
    ],
)
def test_the_newest_secret_comes_first(given: dict[str, str], secrets: list[str]) -> None:
    assert Settings.model_validate(given).secrets == secrets


ONLY_KEYS = {"database_url": DATABASE_URL, "better_auth_url": "https://app.example.com"}


@pytest.mark.parametrize(
    ("given", "secrets"),
    [
        ({"better_auth_secrets": f"2:{SECRET},1:{OLDER}"}, [SECRET, OLDER]),
        ({"better_auth_secret": SECRET, "cursor_secret": OLDER}, [OLDER]),
        (ONLY_KEYS | {"cursor_secret": SECRET}, [SECRET]),
    ],
)
def test_cursors_are_signed_with_their_own_secret_or_the_shared_ones(
    given: dict[str, str], secrets: list[str]
) -> None:
    assert Settings.model_validate(given).cursor_secrets == secrets


def test_without_a_secret_the_cursor_secret_is_scrypt_of_the_database_url() -> None:
    of_one, again, of_another = (
        Settings.model_validate(ONLY_KEYS | {"database_url": url}).cursor_secrets
        for url in (DATABASE_URL, DATABASE_URL, f"{DATABASE_URL}2")
    )
    guess = hashlib.scrypt(DATABASE_URL.encode(), salt=b"task-backend:cursors", n=2**14, r=8, p=1)

    assert of_one == again == [guess.hex()]
    assert of_one != of_another


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1s", 1), ("15m", 900), ("24h", 86_400), ("7d", 604_800), ("999999999s", 999_999_999)],
)
def test_a_lifetime_is_read_in_seconds(value: str, seconds: int) -> None:
    assert Settings(jwt_expiration=value).jwt_expiration_s == seconds


@pytest.mark.parametrize(
    ("value", "origins"),
    [
        ("https://app.example.com", ["https://app.example.com"]),
        ("https://app.example.com/", ["https://app.example.com"]),
        (
            " https://a.example.com/ ,http://localhost:3000, ",
            ["https://a.example.com", "http://localhost:3000"],
        ),
        ("http://[::1]:3000", ["http://[::1]:3000"]),
        ("*", ["*"]),
        (",", []),
    ],
)
def test_origins_are_a_list_without_trailing_slashes(value: str, origins: list[str]) -> None:
    assert Settings(allowed_origins=value).origins == origins


OWN_POSTGRES = {"database_url": DATABASE_URL, "better_auth_secret": SECRET}
OWN_SQLITE = {"database_url": "sqlite:///tasks.db", "better_auth_secret": SECRET}


@pytest.mark.parametrize(
    ("given", "embedded", "migrates"),
    [
        ({}, True, True),
        ({"better_auth_secret": SECRET}, True, True),
        ({"migrate_on_start": False}, True, False),
        (OWN_SQLITE, False, True),
        (OWN_SQLITE | {"migrate_on_start": False}, False, False),
        (OWN_SQLITE | {"environment": "production"}, False, True),
        (OWN_POSTGRES, False, False),
        (OWN_POSTGRES | {"migrate_on_start": True}, False, True),
        (OWN_POSTGRES | {"environment": "production"}, False, False),
    ],
)
def test_a_start_migrates_sqlite_unless_told_otherwise(
    given: dict[str, object], embedded: bool, migrates: bool
) -> None:
    settings = Settings.model_validate(given)

    assert (settings.embedded, settings.migrates_on_start) == (embedded, migrates)


def test_the_embedded_database_lies_in_the_data_folder() -> None:
    assert Settings().resolved_database_url == "sqlite:///data/tasks.db"
    assert (
        Settings(data_dir=Path("/var/lib/tasks")).resolved_database_url == "sqlite:////var/lib/tasks/tasks.db"
    )
    assert Settings.model_validate(OWN_POSTGRES).resolved_database_url == DATABASE_URL


@pytest.mark.parametrize(
    ("given", "level", "format_"),
    [
        ({}, "info", "console"),
        ({"debug": True}, "debug", "console"),
        ({"debug": True, "log_level": "error"}, "debug", "console"),
        ({"log_level": "WARNING", "log_format": "JSON"}, "warning", "json"),
        (OWN_POSTGRES | {"environment": "production"}, "info", "json"),
        (OWN_POSTGRES | {"environment": "production", "log_format": "console"}, "info", "console"),
    ],
)
def test_production_logs_json_and_debug_logs_more(given: dict[str, object], level: str, format_: str) -> None:
    settings = Settings.model_validate(given)

    assert (settings.resolved_log_level, settings.resolved_log_format) == (level, format_)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), ("1", True), ("ON", True), ("false", False), ("0", False), ("No", False)],
)
def test_a_boolean_setting_may_be_written_in_several_ways(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    assert settings_of(monkeypatch, ACCESS_LOG=value).access_log is expected


@pytest.mark.parametrize(
    ("name", "value", "clause"),
    [
        ("JWT_LEEWAY_S", "-1", "must be greater than or equal to 0"),
        ("JWT_ALGORITHMS", "EdDSA,none", None),
        ("JWT_ALGORITHMS", "HS512", None),
        ("JWT_ALGORITHMS", ",", None),
        ("JWKS_URL", "https://app.example.com/keys", None),
    ],
)
def test_invalid_issuer_settings_are_reported(
    folder: Path, name: str, value: str, clause: str | None
) -> None:
    done = run("import config; config.load_settings()", folder, **{name: value})

    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    if clause is None:
        assert sentence.startswith(("JWT_ALGORITHMS: must be of ", "JWT_ISSUER, JWT_AUDIENCE: must be given"))
    else:
        assert sentence == f"{name}: {clause}"


@pytest.mark.parametrize("name", ["BETTER_AUTH_URL", "JWKS_URL"])
@pytest.mark.parametrize(
    "value",
    [
        "app.example.com",
        "//app.example.com",
        "ftp://app.example.com",
        "https://",
        "https:///keys",
        "https://:443/keys",
        "http://[",
        "http://[::1",
        "http://::1]",
        "http://[zz]",
        "http://h:port",
        "http://h:-1",
        "http://h:80:80",
        "http://h:0",
        "https://user:hunter2@h",
        "http://h:65536",
        "http://h:٣",
        "https://app.example.com/#top",
        "https://app.example.com/#",
        "https://app example.com",
        "https://app.example.com/a b",
        "https://app.example.com\n",
        "https://app.\texample.com",
        "https:\\\\app.example.com",
        "https://app.example.com\\keys",
    ],
)
def test_an_invalid_url_setting_is_reported(refusal: Refusal, name: str, value: str) -> None:
    assert refusal(**{name: value}) == [f"{name}: {NOT_AN_ADDRESS}"]


@pytest.mark.parametrize("value", ["https://app.example.com?", "https://app.example.com/?a=b"])
def test_a_better_auth_url_with_a_query_is_refused(refusal: Refusal, value: str) -> None:
    assert refusal(BETTER_AUTH_URL=value) == [f"BETTER_AUTH_URL: {NOT_AN_ADDRESS}"]


@pytest.mark.parametrize(
    "value",
    [
        "https://x.b2clogin.com/x/discovery/v2.0/keys?p=policy",
        "https://app.example.com/keys/",
        "https://app.example.com//keys/?a=b/&c",
        "http://127.0.0.1:65535",
        "http://[::1]:3000/keys",
        "HTTPS://App.Example.com/Keys",
    ],
)
def test_jwks_url_is_kept_unchanged(value: str) -> None:
    settings = Settings(better_auth_url="https://app.example.com", jwks_url=value)

    assert settings.resolved_jwks_url == value


def test_better_auths_origin_is_issuer_and_audience_unless_they_are_given() -> None:
    alone = Settings(better_auth_url="https://app.example.com/base/")
    given = Settings(better_auth_url="https://app.example.com", jwt_issuer="a, b", jwt_audience="c")

    assert alone.issuers == alone.audiences == {"https://app.example.com"}
    assert alone.resolved_jwks_url == "https://app.example.com/base/api/auth/jwks"
    assert (alone.given_issuers, alone.given_audiences) == (frozenset(), frozenset())
    assert given.issuers == {"a", "b"}
    assert given.audiences == {"c"}


def test_every_implemented_algorithm_is_accepted_by_default() -> None:
    assert Settings().algorithms == set(tokens.ALGORITHMS)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, True),
        ({"local_accounts": False}, False),
        ({"better_auth_secret": SECRET}, False),
        ({"better_auth_secrets": f"1:{SECRET}"}, False),
        ({"better_auth_url": "https://app.example.com"}, False),
        ({"jwks_url": "https://app.example.com/jwks", "jwt_issuer": "a", "jwt_audience": "b"}, False),
        ({"jwks": "keys.json", "jwt_issuer": "a", "jwt_audience": "b"}, False),
        ({"better_auth_secret": SECRET, "local_accounts": True}, True),
        ({"better_auth_url": "https://app.example.com", "local_accounts": True}, True),
        ({"jwt_algorithms": "EdDSA"}, False),
        ({"database_url": DATABASE_URL, "better_auth_secret": SECRET}, False),
        ({"database_url": DATABASE_URL, "better_auth_secret": SECRET, "local_accounts": True}, True),
        ({"environment": "production", "database_url": DATABASE_URL, "better_auth_secret": SECRET}, False),
    ],
)
def test_local_accounts_default_to_on_only_if_no_token_setting_is_set(
    given: dict[str, object], kept: bool
) -> None:
    assert Settings.model_validate(given).keeps_accounts is kept


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            {"DATABASE_URL": DATABASE_URL, "BETTER_AUTH_URL": "https://app.example.com"},
            "LOCAL_ACCOUNTS: needs BETTER_AUTH_SECRET, which signs the tokens",
        ),
        ({"DATABASE_URL": DATABASE_URL}, NO_SECRET),
        ({"JWT_ALGORITHMS": "EdDSA"}, "LOCAL_ACCOUNTS: needs HS256 among JWT_ALGORITHMS"),
    ],
)
def test_accounts_need_a_secret_and_hs256(
    refusal: Refusal, environment: dict[str, str], sentence: str
) -> None:
    assert refusal(LOCAL_ACCOUNTS="true", **environment) == [sentence]


@pytest.mark.parametrize("rate", ["off", "OFF", "1/second", "600/minute", "5000/hours", "100/10 seconds"])
def test_a_rate_is_a_number_and_a_time(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setenv("RATE_LIMIT", rate)

    limit = load_settings().rate_limit

    assert limit == "off" or limits.parse(limit).amount


def test_a_star_in_allowed_hosts_allows_any_host() -> None:
    given = Settings(better_auth_secret=SECRET, allowed_hosts="API.example.com, *.example.com")

    assert given.hosts == ["api.example.com", "*.example.com"]
    assert given.model_copy(update={"allowed_hosts": "api.example.com,*"}).hosts == []

"""Commands of `main.py` that exit by themselves, and starts that fail with an error message."""

from pathlib import Path

import jwt
import pytest

from tests.conftest import SECRET
from tests.service import PROJECT, command


@pytest.mark.parametrize(("lifetime", "seconds"), [("15m", 900), ("24h", 86_400), ("7d", 604_800)])
def test_token_prints_a_token_of_the_configured_lifetime(tmp_path: Path, lifetime: str, seconds: int) -> None:
    done = command(tmp_path, "token", "alice", JWT_EXPIRATION=lifetime, BETTER_AUTH_SECRET=SECRET)

    claims = jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"])
    assert claims["sub"] == "alice"
    assert claims["exp"] - claims["iat"] == seconds


def test_a_printed_token_has_the_issuer_and_audience_of_the_settings(tmp_path: Path) -> None:
    settings = {"JWT_ISSUER": "https://b.example,https://a.example", "JWT_AUDIENCE": "tasks"}

    done = command(tmp_path, "token", "alice", BETTER_AUTH_SECRET=SECRET, **settings)

    claims = jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"], audience="tasks")
    assert (claims["iss"], claims["aud"]) == ("https://a.example", "tasks")


def test_the_token_command_fails_if_hs256_is_not_accepted(tmp_path: Path) -> None:
    done = command(tmp_path, "token", "alice", BETTER_AUTH_SECRET=SECRET, JWT_ALGORITHMS="EdDSA")

    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["JWT_ALGORITHMS: must have HS256 to make a token"],
    )


def test_the_openapi_document_is_printed_without_settings(tmp_path: Path) -> None:
    done = command(tmp_path, "openapi", BETTER_AUTH_SECRET="short")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (PROJECT / "openapi.json").read_text()
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_setting_ends_a_command_with_a_sentence(tmp_path: Path) -> None:
    done = command(tmp_path, "token", "alice", BETTER_AUTH_SECRET="short")

    assert done.returncode == 2
    assert done.stderr.splitlines() == ["BETTER_AUTH_SECRET: must be at least 32 characters"]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://h/d", "DATABASE_URL: must begin with postgresql:// or sqlite:///"),
        (
            "postgresql://u:hunter2@h/d?sslmode=maybe",
            "DATABASE_URL: has an sslmode that is not one of "
            "disable, allow, prefer, require, verify-ca, verify-full",
        ),
    ],
)
def test_an_unusable_database_url_ends_the_start_with_a_sentence(
    tmp_path: Path, url: str, sentence: str
) -> None:
    done = command(tmp_path, DATABASE_URL=url, BETTER_AUTH_SECRET=SECRET)

    assert (done.returncode, done.stderr.splitlines()) == (2, [sentence])


def test_a_data_folder_that_cannot_be_made_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")

    done = command(tmp_path)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr

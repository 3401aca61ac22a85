"""Where a page of a list ends: sealed, so that clients can neither read nor change it, for one list."""

import base64
import binascii
import contextlib
import hashlib
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV


class CursorInvalid(ValueError):
    """The cursor is not one that we gave for this list."""


class CursorSealer:
    """Writes with the newest secret and reads what any of *secrets* has sealed.

    AES-SIV (RFC 5297) needs no nonce, so none can repeat; equal positions of one list have equal cursors.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        # A key of its own: what signs a token never seals anything else.
        self._keys = [AESSIV(hashlib.sha512(b"cursor:" + secret.encode()).digest()) for secret in secrets]

    def write(self, position: Sequence[Any], binding: str) -> str:
        """Return *position*, the sort key and id of a page's last task, as a cursor for *binding*."""
        payload = orjson.dumps([_Time.dump(part) for part in position])
        sealed = self._keys[0].encrypt(payload, [_associated(binding)])
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def read(self, cursor: str, binding: str) -> list[Any]:
        """Return the position in *cursor*.

        Raises:
            CursorInvalid: it was changed, or made for another user, filter or order, or holds no position.
        """
        try:
            sealed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
            return [_Time.load(part) for part in orjson.loads(self._open(sealed, _associated(binding)))]
        except (binascii.Error, KeyError, TypeError, ValueError) as error:
            raise CursorInvalid from error

    def _open(self, sealed: bytes, binding: bytes) -> bytes:
        for key in self._keys:
            with contextlib.suppress(InvalidTag):
                return key.decrypt(sealed, [binding])
        raise CursorInvalid


class _Time:
    """JSON has no times and days: they travel as `{"t": ...}`, to the microsecond, and `{"d": ...}`."""

    @staticmethod
    def dump(part: Any) -> Any:
        if isinstance(part, datetime):
            return {"t": part.isoformat()}
        return {"d": part.isoformat()} if isinstance(part, date) else part

    @staticmethod
    def load(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return datetime.fromisoformat(part["t"]) if "t" in part else date.fromisoformat(part["d"])


def _associated(binding: str) -> bytes:
    # Never empty: older versions of OpenSSL take no empty text.
    return b"list:" + binding.encode(errors="surrogatepass")

"""Where a page of a list ends: opaque to the client, signed, and good for the same list only."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

import orjson

_MAC_BYTES = 16


class CursorInvalid(ValueError):
    """The cursor is not one that we gave for this list."""


class CursorSigner:
    """Writes with the newest secret and reads what any of *secrets* has signed."""

    def __init__(self, secrets: Sequence[str]) -> None:
        # A key of its own: what signs a token never signs anything else.
        self._keys = [hashlib.sha256(b"cursor:" + secret.encode()).digest() for secret in secrets]

    def write(self, position: Sequence[Any], binding: str) -> str:
        """Return *position*, the sort key and id of a page's last task, as a cursor for *binding*."""
        payload = orjson.dumps([_Time.dump(part) for part in position])
        return base64.urlsafe_b64encode(_mac(self._keys[0], payload, binding) + payload).decode().rstrip("=")

    def read(self, cursor: str, binding: str) -> list[Any]:
        """Return the position in *cursor*.

        Raises:
            CursorInvalid: it was changed, or made for another user, filter or order, or holds no position.
        """
        try:
            raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise CursorInvalid from error
        mac, payload = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not any(hmac.compare_digest(mac, _mac(key, payload, binding)) for key in self._keys):
            raise CursorInvalid
        try:
            return [_Time.load(part) for part in orjson.loads(payload)]
        except (KeyError, TypeError, ValueError) as error:
            raise CursorInvalid from error


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


def _mac(key: bytes, payload: bytes, binding: str) -> bytes:
    message = binding.encode(errors="surrogatepass") + b"\0" + payload
    return hmac.digest(key, message, "sha256")[:_MAC_BYTES]

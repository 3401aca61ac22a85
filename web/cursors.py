"""Cursors: the position at which a page ends, sealed for one list only, and the link to the next page."""

import base64
import binascii
import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property, lru_cache
from typing import Any, get_args
from urllib.parse import quote

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from starlette.types import Scope

from errors import invalid_parameter
from models import Priority
from schemas import ID_MAX, Filter, Order, Position
from web.paths import quoted_path


class CursorInvalid(ValueError):
    """The cursor was not issued for this list."""


@dataclass(frozen=True, slots=True)
class TaskList:
    """The list that a cursor is valid for: one user's tasks that match the filters, in this order."""

    user_id: str
    filters: Filter
    order: Order

    @property
    def binding(self) -> str:
        return f"{self.user_id}\n{description(self.filters, self.order)}"

    def position_of(self, task: Any) -> Position:
        return Position(getattr(task, self.order.field), task.id)


@lru_cache(256)
def description(filters: Filter, order: Order) -> str:
    """Return *filters* and *order* as a text that is the same in every process."""
    # Sorted, because the order of a set may differ between processes.
    states, others = sorted(filters.states), filters._replace(states=frozenset())
    return f"{states}\n{others}\n{order}"


class CursorSealer:
    """Seals cursors with the newest secret and opens those sealed with any of *secrets*.

    AES-SIV (RFC 5297) needs no nonce, so none can repeat; equal positions of one list have equal cursors.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        # A derived key, because a secret that signs tokens must not serve another purpose.
        self._keys = [AESSIV(hashlib.sha512(b"cursor:" + secret.encode()).digest()) for secret in secrets]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the secret. Part of a list's `ETag`: only it opens the cursor in the list's `Link`."""
        return self.write((0,), "")[:8]

    def write(self, position: Sequence[Any], binding: str) -> str:
        """Return *position*, the sort key and id of a page's last task, as a cursor for *binding*."""
        payload = msgspec.json.encode([_Time.dump(part) for part in position])
        sealed = self._keys[0].encrypt(payload, [_associated(binding)])
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def read(self, cursor: str, binding: str) -> list[Any]:
        """Return the position in *cursor*.

        Raises:
            CursorInvalid: it was changed, or made for another user, filter or order, or holds no position.
        """
        try:
            sealed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
            payload = self._open(sealed, _associated(binding))
            return [_Time.load(part) for part in msgspec.json.decode(payload)]
        except (binascii.Error, KeyError, TypeError, ValueError) as error:
            raise CursorInvalid from error

    def position(self, cursor: str, tasks: TaskList) -> Position:
        """Return the position in *cursor*, after which the next page of *tasks* begins.

        Raises:
            CursorInvalid: as in `read`, or the position does not fit the order of *tasks*.
        """
        match self.read(cursor, tasks.binding):
            # Even sealed values are checked before they go into a statement.
            case [key, int(task_id)] if _is_key(key, tasks.order) and _is_id(task_id):
                return Position(key, task_id)
        raise CursorInvalid

    def start(self, cursor: str | None, tasks: TaskList) -> Position | None:
        """Return the position after which a page of *tasks* begins; None for the first page.

        Raises:
            Unprocessable: the *cursor* that the client sent has none.
        """
        if cursor is None:
            return None
        try:
            return self.position(cursor, tasks)
        except CursorInvalid as error:
            mistake = "was not given for this list, its filters and its order"
            raise invalid_parameter("cursor", mistake) from error

    def link_to_next(self, scope: Scope, last: Position, binding: str) -> str:
        """Return a `Link` (RFC 8288) to the page after the position *last*; other parameters stay as sent."""
        cursor = self.write(last, binding)
        sent = scope["query_string"].decode("latin-1").split("&")
        kept = [parameter for parameter in sent if parameter and not parameter.startswith("cursor=")]
        query = quote("&".join([*kept, f"cursor={cursor}"]), safe="%&=+,:/?-._~!$'()*;@")
        return f'<{quoted_path(scope)}?{query}>; rel="next"'

    def _open(self, sealed: bytes, binding: bytes) -> bytes:
        for key in self._keys:
            with contextlib.suppress(InvalidTag):
                return key.decrypt(sealed, [binding])
        raise CursorInvalid


def _is_id(task_id: int) -> bool:
    return type(task_id) is int and 1 <= task_id <= ID_MAX  # True is an int too


def _is_key(key: object, order: Order) -> bool:
    match order.field:
        case "title":
            return isinstance(key, str)
        case "priority":
            return key is None or key in get_args(Priority)
        case "due_date":
            return key is None or type(key) is date
    return isinstance(key, datetime)


class _Time:
    """JSON has no times and days: they are written as `{"t": ...}`, to the microsecond, and `{"d": ...}`."""

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
    # Never empty: older versions of OpenSSL refuse empty associated data.
    return b"list:" + binding.encode(errors="surrogatepass")

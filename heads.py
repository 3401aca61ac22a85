"""The head of a request: its size, its fields, and what says where its body ends (RFC 9112)."""

import re

import errors

HEAD_MAX_BYTES = 32 * 1024  # twice the largest token
FIELDS_MAX = 100  # a browser sends about 20; each takes far more memory than it has bytes
# RFC 9110, section 7.2, and RFC 3986, section 3.2: nothing, a name or an address, and perhaps a port.
_HOST = re.compile(rb"([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]+)(/?)(.*)", re.IGNORECASE)


class MalformedRequest(errors.Problem):
    status = 400
    sentence = "This is not an HTTP request that can be understood"


class HostInvalid(errors.Problem):
    status = 400
    sentence = "An HTTP/1.1 request needs one Host header: a name or an address, and perhaps a port"


class HeadTooLarge(errors.Problem):
    status = 431
    sentence = f"The request's head has over {HEAD_MAX_BYTES // 1024} KiB or over {FIELDS_MAX} fields"


class HeadTimeout(errors.Problem):
    status = 408
    sentence = "The request's head did not arrive in time"


class ConnectNotImplemented(errors.Problem):
    status = 501
    sentence = "This service is no proxy: CONNECT is not implemented"


class TransferEncodingNotImplemented(errors.Problem):
    status = 501
    sentence = "Of transfer encodings only chunked is implemented"


class Head:
    """Checks one head as the parser finds it; what it refuses it raises as a problem."""

    __slots__ = ("_fields", "_has_host", "_is_chunked", "_size_bytes")

    def __init__(self) -> None:
        self._size_bytes = self._fields = 0
        self._has_host = self._is_chunked = False

    def add_url(self, url: bytes) -> None:
        self._size_bytes += len(url)
        if self._size_bytes > HEAD_MAX_BYTES:
            raise HeadTooLarge

    def add_field(self, name: bytes, value: bytes) -> None:
        self.add_trailer(name, value)
        length = len(name)
        if length == 4 and name.lower() == b"host":
            # Two hosts: which one is meant? (RFC 9112, section 3.2)
            if self._has_host or not _HOST.fullmatch(value.rstrip(b" \t")):
                raise HostInvalid
            self._has_host = True
        elif length == 17 and name.lower() == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise TransferEncodingNotImplemented
            self._is_chunked = True

    def add_trailer(self, name: bytes, value: bytes) -> None:
        """Count a field behind the body; it means nothing (RFC 9110, section 6.5.1)."""
        self._fields += 1
        self._size_bytes += len(name) + len(value)
        if self._fields > FIELDS_MAX or self._size_bytes > HEAD_MAX_BYTES:
            raise HeadTooLarge

    def complete(self, version: str) -> None:
        """Check what only the whole head shows."""
        if version == "1.1":
            if not self._has_host:
                raise HostInvalid
        elif version != "1.0" or self._is_chunked:  # HTTP/1.0 has no chunks (RFC 9112, section 6.1)
            raise MalformedRequest


def split_target(url: bytes) -> tuple[bytes, bytes]:
    """Return host and path of a request target that does not begin with a slash.

    An absolute one counts instead of the Host header (RFC 9112, section 3.2.2).
    """
    if not (parts := _ABSOLUTE.fullmatch(url)) or not _HOST.fullmatch(parts[1]):
        raise MalformedRequest
    return parts[1], b"/" + parts[3]

"""The head of a request: its size, its fields, and the framing of its body (RFC 9112)."""

import re
from collections.abc import Iterable

import errors

HEAD_MAX_BYTES = 32 * 1024  # twice the largest token
FIELDS_MAX = 100  # a browser sends about 20; each takes far more memory than it has bytes
# RFC 9110, section 7.2, and RFC 3986, section 3.2: nothing, a name or an address, and perhaps a port.
_HOST = re.compile(
    rb"([A-Za-z0-9._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})*+(:[0-9]*)?"
    rb"|\[[0-9A-Fa-f:.]+\](:[0-9]*)?"
)
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


def check(fields: Iterable[tuple[bytes, bytes]], version: str) -> None:
    """Check a head whose *fields* have their names in lower case.

    Raises:
        HostInvalid: there is no Host, more than one, or a malformed one.
        TransferEncodingNotImplemented: the encoding is not chunked.
        MalformedRequest: the version of HTTP is neither 1.0 nor 1.1, or 1.0 and the body has chunks.
    """
    has_host = is_chunked = False
    for name, value in fields:
        if name == b"host":
            # Two Host fields are ambiguous (RFC 9112, section 3.2).
            if has_host or not _HOST.fullmatch(value.rstrip(b" \t")):
                raise HostInvalid
            has_host = True
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise TransferEncodingNotImplemented
            is_chunked = True
    if version == "1.1":
        if not has_host:
            raise HostInvalid
    elif version != "1.0" or is_chunked:  # HTTP/1.0 has no chunks (RFC 9112, section 6.1)
        raise MalformedRequest


def split_target(url: bytes) -> tuple[bytes, bytes]:
    """Return host and path of a request target that does not begin with a slash.

    The host of an absolute target replaces the Host header (RFC 9112, section 3.2.2).
    """
    if not (parts := _ABSOLUTE.fullmatch(url)) or not _HOST.fullmatch(parts[1]):
        raise MalformedRequest
    return parts[1], b"/" + parts[3]

"""Response headers that restrict what browsers may do."""

from collections.abc import Iterable

Field = tuple[bytes, bytes]

CONTENT_POLICY = b"content-security-policy"
HSTS = (b"strict-transport-security", b"max-age=31536000")  # a year; subdomains may not be ours
CACHE_CONTROL = b"cache-control"
NO_STORE = (CACHE_CONTROL, b"no-store")
NOTHING = (CONTENT_POLICY, b"default-src 'none'; frame-ancestors 'none'")
ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


def security_headers(scheme: str, path: str, own: Iterable[Field]) -> tuple[Field, ...]:
    """Return what to add to an answer with the headers *own*.

    What is below /api/, tasks and accounts, is not stored unless the answer has its own Cache-Control.
    A page brings a content policy of its own; everything else may load nothing.
    """
    is_private = path.startswith("/api/")
    own_header = CACHE_CONTROL if is_private else CONTENT_POLICY
    return _ADDED[scheme == "https", is_private, any(name == own_header for name, _ in own)]


# By whether the request came by https, whether its path is below /api/, and whether the response has the
# header in question: Cache-Control there, Content-Security-Policy elsewhere.
_ADDED = {
    (is_https, is_private, is_set): ALWAYS
    + (HSTS,) * is_https
    + (NO_STORE,) * (is_private and not is_set)
    + (NOTHING,) * (is_private or not is_set)
    for is_https in (False, True)
    for is_private in (False, True)
    for is_set in (False, True)
}

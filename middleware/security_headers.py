"""Response headers that restrict what browsers may do."""

from collections.abc import Iterable

Field = tuple[bytes, bytes]

CONTENT_POLICY = b"content-security-policy"
HSTS = (b"strict-transport-security", b"max-age=31536000")  # a year; subdomains may not be ours
NO_STORE = (b"cache-control", b"no-store")
NOTHING = (CONTENT_POLICY, b"default-src 'none'; frame-ancestors 'none'")
ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


def security_headers(scheme: str, path: str, own: Iterable[Field]) -> tuple[Field, ...]:
    """Return what to add to an answer with the headers *own*.

    A page brings a content policy of its own; everything else may load nothing.
    """
    is_private = path.startswith("/api/")
    brings_policy = not is_private and any(name == CONTENT_POLICY for name, _ in own)
    return _ADDED[scheme == "https", is_private, brings_policy]


# By whether the request came by https, whether its path is below /api/ (tasks and accounts are private), and
# whether the response has a content policy of its own.
_ADDED = {
    (is_https, is_private, brings_policy): ALWAYS
    + (HSTS,) * is_https
    + (NO_STORE,) * is_private
    + (NOTHING,) * (not brings_policy)
    for is_https in (False, True)
    for is_private in (False, True)
    for brings_policy in (False, True)
}

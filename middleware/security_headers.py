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

    What is below /api/, tasks and accounts, is private: nobody may store it unless the answer says otherwise.
    A page brings a content policy of its own; everything else may load nothing.
    """
    is_private = path.startswith("/api/")
    brings = CACHE_CONTROL if is_private else CONTENT_POLICY
    return _ADDED[scheme == "https", is_private, any(name == brings for name, _ in own)]


# By whether the request came by https, whether its path is private, and whether the response has a rule of
# its own: a private one for caches, another one for content.
_ADDED = {
    (is_https, is_private, has_rule): ALWAYS
    + (HSTS,) * is_https
    + (NO_STORE,) * (is_private and not has_rule)
    + (NOTHING,) * (is_private or not has_rule)
    for is_https in (False, True)
    for is_private in (False, True)
    for has_rule in (False, True)
}

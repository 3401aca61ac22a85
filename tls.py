"""The lowest version of TLS that the service speaks to its database, its issuer and its Redis."""

import ssl

# RFC 8996. Some builds of Python, Debian's among them, leave it to the configuration of OpenSSL.
MINIMUM_VERSION = ssl.TLSVersion.TLSv1_2


def with_minimum_version(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = MINIMUM_VERSION
    return context

"""A token issuer: private keys, and a real HTTP server that publishes the public keys or misbehaves."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from auth import jwks

ORIGIN = "https://front.example.com"


def _part(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


@dataclass(frozen=True)
class SigningKey:
    kid: str
    private: Any
    algorithm: str

    @property
    def public(self) -> dict[str, Any]:
        """The public JWK as Better Auth publishes it, without `use`."""
        made = jwks.ALGORITHMS[self.algorithm].to_jwk(self.private.public_key(), as_dict=True)
        return {name: value for name, value in made.items() if name != "key_ops"} | {"kid": self.kid}

    def token(self, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """Return a signed token; a header or claim set to None is omitted."""
        now = int(time.time())
        content = {"sub": "alice", "iss": ORIGIN, "aud": ORIGIN, "iat": now, "exp": now + 900} | claims
        head = {"alg": self.algorithm, "kid": self.kid} | (header or {})
        kept = [
            {name: value for name, value in part.items() if value is not None} for part in (head, content)
        ]
        signed = ".".join(_part(json.dumps(part).encode()) for part in kept)
        return f"{signed}.{_part(jwks.ALGORITHMS[self.algorithm].sign(signed.encode(), self.private))}"


def new_key(algorithm: str, kid: str | None = None) -> SigningKey:
    private: Any
    if algorithm in ("EdDSA", "Ed25519"):
        private = ed25519.Ed25519PrivateKey.generate()
    elif algorithm.startswith("ES"):
        curve = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}[algorithm]
        private = ec.generate_private_key(curve)
    else:
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return SigningKey(kid or f"key-{algorithm}", private, algorithm)


def document(*keys: Any) -> bytes:
    return json.dumps({"keys": [k.public if isinstance(k, SigningKey) else k for k in keys]}).encode()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return f"{head}\r\n\r\n".encode() + body


@dataclass
class Issuer:
    """Sends `reply` to every request after `delay_s`; if it is None, resets the connection."""

    reply: bytes | None = None
    delay_s: float = 0.0
    port: int = 0
    requests: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/auth/jwks"

    def publish(self, *keys: Any) -> None:
        self.reply = answer(document(*keys))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            await asyncio.sleep(self.delay_s)
            if self.reply is None:
                writer.transport.abort()
                return
            writer.write(self.reply)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def running_issuer(*keys: SigningKey) -> AsyncIterator[Issuer]:
    issuer = Issuer()
    issuer.publish(*keys)
    server = await asyncio.start_server(issuer.serve, "127.0.0.1", 0)
    issuer.port = server.sockets[0].getsockname()[1]
    try:
        yield issuer
    finally:
        server.close()

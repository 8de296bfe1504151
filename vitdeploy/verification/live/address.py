"""Where a live server is: ``http://host:port/base``, ``grpc://host:port``, and both with TLS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from vitdeploy.errors import UsageError, did_you_mean

Protocol = Literal["http", "grpc"]

_SCHEMES: dict[str, tuple[Protocol, bool, int | None]] = {
    "http": ("http", False, 80),
    "https": ("http", True, 443),
    "grpc": ("grpc", False, None),
    "grpcs": ("grpc", True, 443),
}
"""The protocol, whether with TLS, and the port where none is said."""


@dataclass(frozen=True)
class Address:
    """A parsed ``--url``."""

    protocol: Protocol
    host: str
    """A name or an address; of IPv6 without brackets."""
    port: int
    base: str = ""
    """HTTP: the path in front of ``/v2``, beginning with a slash, or empty."""
    tls: bool = False

    @property
    def place(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.protocol}{'s' * self.tls}://{self.place}{self.base}"


def parse_address(url: str) -> Address:
    """Read a URL.

    Raises:
        UsageError: it is not one of a server; says what is wrong with it.
    """
    hint = "--url http://127.0.0.1:8000, or grpc://127.0.0.1:8001 (https and grpcs: with TLS)"
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise UsageError(f"--url {url}: has no http:// or grpc:// in front", hint=hint)
    if scheme.lower() not in _SCHEMES:
        raise UsageError(
            f"--url {url}: unknown protocol {scheme!r}{did_you_mean(scheme, _SCHEMES)}", hint=hint
        )
    protocol, tls, port = _SCHEMES[scheme.lower()]
    try:
        parts = urlsplit(url)
        port = parts.port if parts.port is not None else port
    except ValueError as error:
        raise UsageError(f"--url {url}: {error}", hint=hint) from error
    base = parts.path.rstrip("/")
    if problem := _problem(parts, protocol, port, base):
        raise UsageError(
            f"--url {parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()}: {problem[0]}",
            hint=problem[1] or hint,
        )
    return Address(protocol, parts.hostname or "", port or 0, base, tls)


def _problem(parts: SplitResult, protocol: Protocol, port: int | None, base: str) -> tuple[str, str] | None:
    """What is wrong with a URL, and a hint where there is a better one than an example."""
    if not parts.hostname or any(c.isspace() for c in parts.netloc):
        return "names no host", ""
    if parts.username is not None:
        return "has a user name in it", 'pass credentials as --header "Authorization: ..."'
    if parts.query or parts.fragment:
        return "has a query or fragment, which no server's address has", ""
    if port is None or port == 0:
        return "names no port", ""
    if protocol == "grpc" and base:
        return f"has a path ({base}), which gRPC does not know", ""
    if "v2" in base.split("/"):
        return "goes on after the server's address", "leave out /v2 and what follows; --model names the model"
    return None

"""Pictures that a request names by an address. Off unless the operator lists the hosts that are trusted.

A server that fetches what strangers name can be made to ask its own network. So: only listed hosts, only
http and https on their own ports (or the port that is listed), no name or password in the address, no
redirect. The host is looked up once; every address that comes back must be one of the open internet, and the
connection goes to one that was checked, by number, so that a second answer of the name server changes
nothing. Certificates are checked against the host's name. One deadline covers all of it, drip by drip, and no
more is read than a picture may have.

What is fetched is bytes that nobody trusts: ``requests.py`` looks at them as at any others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from tinymodal.serve.errors import ApiError, invalid

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port -> its addresses as text."""
Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

PORTS = {"http": 80, "https": 443}
LONGEST_URL = 2_048
AGENT = b"tinymodal"
TRANSLATED = (
    ipaddress.ip_network("64:ff9b::/96"),
    ipaddress.ip_network("64:ff9b:1::/48"),
    ipaddress.ip_network("::/96"),
)
"""IPv6 that a gateway turns into the IPv4 of its last 32 bits (RFC 6052, RFC 8215; the last one obsolete)."""


async def system_lookup(host: str, port: int) -> Sequence[str]:
    """All addresses that the system's resolver gives."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_open(address: Address) -> bool:
    """Whether it is one of the open internet: not private, loopback, link-local, multicast or reserved.

    Of an address that carries another one (IPv4 in IPv6, 6to4, Teredo, NAT64) both must be.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner: list[ipaddress.IPv4Address] = [
            each for each in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if each
        ]
        if any(address in network for network in TRANSLATED):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        if not all(is_open(each) for each in inner):
            return False
        if address.ipv4_mapped is not None:
            return True
        if address.is_site_local or address.scope_id is not None:
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not address.is_unspecified
        and not address.is_loopback
        and not address.is_link_local
    )


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches pictures from the hosts it was given.

    Args:
        hosts: see ``Limits.image_hosts``.
        max_bytes: of a picture.
        max_s: from looking the host up to the last byte.
        lookup: how a host's addresses are found.
        connect: how a connection is opened, see ``asyncio.open_connection``.
        trusted: which addresses are.
    """

    hosts: tuple[str, ...]
    max_bytes: int
    max_s: float
    lookup: Lookup = system_lookup
    connect: Connect = asyncio.open_connection
    trusted: Callable[[Address], bool] = is_open

    async def fetch(self, url: str) -> bytes:
        """The bytes at an address.

        Raises:
            ApiError: 400 with the reason; which of the host's addresses was refused is not told.
        """
        target, host, port = self._checked(url)
        try:
            async with asyncio.timeout(self.max_s):
                return await self._get(target, host, port)
        except TimeoutError:
            raise _refused(f"it took longer than {self.max_s:g} s") from None
        except (OSError, h11.ProtocolError, ssl.SSLError, asyncio.IncompleteReadError):
            # The reason would tell what listens where.
            raise _refused("it could not be fetched") from None

    def _checked(self, url: str) -> tuple[SplitResult, str, int]:
        """An address in its parts, once nothing speaks against asking for it."""
        if not self.hosts:
            raise _refused(
                "this server fetches no pictures; send it as data:image/png;base64,..., or have the operator "
                "allow its host"
            )
        if len(url) > LONGEST_URL or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
            raise _refused(
                f"an address has at most {LONGEST_URL:,} printable ASCII characters, and no backslash"
            )
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").removesuffix("."), parts.port
        except ValueError:
            raise _refused("this is not an address") from None
        if parts.scheme not in PORTS:
            raise _refused("only http and https are fetched")
        if "@" in parts.netloc:
            raise _refused("an address may not hold a name or a password")
        if not host or not self._listed(host, port, PORTS[parts.scheme]):
            raise _refused("its host is not one of those that this server fetches pictures from")
        return parts, host, port or PORTS[parts.scheme]

    def _listed(self, host: str, port: int | None, default: int) -> bool:
        for entry in self.hosts:
            name, colon, own = entry.lower().rpartition(":") if ":" in entry else (entry.lower(), "", "")
            if (port or default) != (int(own) if colon else default):
                continue
            if host == name or (name.startswith("*.") and host.endswith(name[1:]) and host != name[2:]):
                return True
        return False

    async def _get(self, target: SplitResult, host: str, port: int) -> bytes:
        addresses = [ipaddress.ip_address(each) for each in await self.lookup(host, port)]
        # One that is not trusted is enough: a name that points inside as well is not one to ask.
        if not addresses or not all(self.trusted(each) for each in addresses):
            raise _refused("its host is not on the open internet")
        secured: dict[str, Any] = {"ssl": tls(), "server_hostname": host} if target.scheme == "https" else {}
        reader, writer = await self.connect(str(addresses[0]), port, limit=1 << 16, **secured)
        try:
            return await self._ask(reader, writer, target)
        finally:
            # Not waited for: the other side may never answer the goodbye.
            with suppress(OSError, RuntimeError):
                writer.transport.abort()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: SplitResult
    ) -> bytes:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 14)
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        asked = h11.Request(
            method=b"GET",
            target=path.encode("ascii"),
            headers=[
                (b"host", target.netloc.encode("ascii")),
                (b"user-agent", AGENT),
                (b"accept", b"image/*"),
                (b"accept-encoding", b"identity"),
                (b"connection", b"close"),
            ],
        )
        writer.write((connection.send(asked) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                self._check(event)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.max_bytes:
                    raise self._too_large()
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return bytes(body)

    def _check(self, response: h11.Response) -> None:
        """Refuse an answer that is no picture, before its body is read."""
        headers = dict(response.headers)
        if 300 <= response.status_code < 400:
            raise _refused("it leads elsewhere, and redirects are not followed")
        if response.status_code != 200:
            raise _refused(f"its host answers with status {response.status_code}")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _refused("it comes compressed, which nobody asked for")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return _refused(f"it is larger than {self.max_bytes / 1e6:g} MB")


@cache
def tls() -> ssl.SSLContext:
    """Certificates are checked, and the name in them."""
    return ssl.create_default_context()


def _refused(reason: str) -> ApiError:
    return invalid(f"The picture at this address is not read: {reason}.", "image_url", "image_url_refused")

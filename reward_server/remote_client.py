"""Requests to users' own services: signed, bounded in time and size, tried again, cut off while a service is down, and to public addresses only.

A name is resolved here, every address that it has is checked, and the connection goes to one that was checked: a name that resolves differently the
second time gains nothing. Redirects are not followed and proxies of the environment not used.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import httpx
from circuitbreaker import CircuitBreaker
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from reward_server.verifiers.verdict import Unjudged
from services.contracts.messages import Outcome

FAILURES = 5
"""In a row, after which a service is left alone."""
REST_SECONDS = 30
"""How long it is; then one request is let through, and decides."""
LONGEST_REPLY = 1 << 20
"""Bytes."""
SIGNATURE, TIMESTAMP = "X-Offbeat-Signature", "X-Offbeat-Timestamp"
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], list[str]]


class Unreachable(Exception):
    """The service gave no answer, or one that says that it cannot now. Worth another try."""


def addresses_of(host: str, port: int) -> list[str]:
    """Raises OSError."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


class RemoteClient:
    """Safe to use from several threads."""

    def __init__(
        self, *, key: str | None = None, networks: tuple[str, ...] = (), resolve: Resolve = addresses_of, wait_seconds: float = 0.2
    ) -> None:  # fmt: skip
        """`networks` beside the public internet may be connected to. Raises ValueError when one is none."""
        self._key = key.encode() if key else None
        self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(network) for network in networks)
        self._resolve, self._wait_seconds = resolve, wait_seconds
        self._lock = threading.Lock()
        self._services: dict[tuple[str, str, int], tuple[httpx.Client, CircuitBreaker]] = {}

    def post(self, url: str, body: bytes, *, seconds: float, attempts: int) -> bytes:
        """The reply to a JSON document. `seconds` are for each attempt. Raises Unjudged."""
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL as wrong:
            raise _failed(f"{url!r} is no address: {wrong}") from wrong
        if target.scheme not in ("http", "https") or not target.host or target.userinfo:
            raise _failed(f"{url!r} must be an http or https address without a password in it")
        client, breaker = self._service(target)
        wait = wait_exponential_jitter(multiplier=self._wait_seconds, max=5, jitter=self._wait_seconds)
        again = Retrying(stop=stop_after_attempt(attempts), wait=wait, retry=retry_if_exception_type(Unreachable), reraise=True)
        try:
            return again(partial(self._guarded, client, breaker, target, body, seconds))
        except Unreachable as reason:
            raise _failed(f"{target.host}: {reason}") from reason

    def close(self) -> None:
        with self._lock:
            for client, _ in self._services.values():
                client.close()
            self._services.clear()

    def _service(self, target: httpx.URL) -> tuple[httpx.Client, CircuitBreaker]:
        """Connections of one service, never shared with another whose name has the same address."""
        name = (target.scheme, target.host, _port(target))
        with self._lock:
            if name not in self._services:
                client = httpx.Client(follow_redirects=False, trust_env=False)
                self._services[name] = client, CircuitBreaker(FAILURES, REST_SECONDS, Unreachable, name=target.host)
            return self._services[name]

    def _guarded(self, client: httpx.Client, breaker: CircuitBreaker, target: httpx.URL, body: bytes, seconds: float) -> bytes:
        if breaker.opened:
            raise _failed(f"{target.host} failed {FAILURES} times in a row and is left alone for {breaker.open_remaining} s")
        with breaker:
            return self._once(client, target, body, seconds)

    def _once(self, client: httpx.Client, target: httpx.URL, body: bytes, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        address = self._checked(target)
        request = client.build_request(
            "POST", target.copy_with(host=address), content=body, headers={**self._headers(body), "Host": _host_header(target)},
            timeout=seconds, extensions={"sni_hostname": target.host},
        )  # fmt: skip
        reply = bytearray()
        try:
            response = client.send(request, stream=True)
            try:
                if response.status_code >= 500 or response.status_code == 429:
                    raise Unreachable(f"answered {response.status_code}")
                if response.status_code != 200:
                    raise _failed(f"{target.host} answered {response.status_code}{' (redirects are not followed)' if response.is_redirect else ''}")
                for part in response.iter_bytes():
                    reply += part
                    if len(reply) > LONGEST_REPLY:
                        raise _failed(f"{target.host} replied with more than {LONGEST_REPLY} bytes")
                    if time.monotonic() > deadline:  # the time-out of the client is one of each read
                        raise Unreachable(f"no whole answer within {seconds:g} s")
            finally:
                response.close()
        except (httpx.TransportError, httpx.DecodingError) as wrong:
            raise Unreachable(f"{type(wrong).__name__}: {str(wrong)[:200]}") from wrong
        return bytes(reply)

    def _checked(self, target: httpx.URL) -> str:
        """An address of the host. One that may not be connected to is not worth another try, nor the service's failure."""
        try:
            found = [target.host] if _is_address(target.host) else self._resolve(target.host, _port(target))
        except OSError as wrong:
            raise Unreachable(f"cannot be resolved: {wrong}") from wrong
        if not found:
            raise Unreachable("has no address")
        for address in found:
            if not self._allowed(ipaddress.ip_address(address.partition("%")[0])):
                raise _failed(f"{target.host} is at {address}, which is no public address: the operator may allow it with OFFBEAT_REMOTE_NETWORKS")
        return found[0]

    def _allowed(self, address: Address) -> bool:
        if any(address in network for network in self._networks):
            return True
        inner = embedded(address)
        return address.is_global and not address.is_multicast and (inner is None or self._allowed(inner))

    def _headers(self, body: bytes) -> dict[str, str]:
        headers = {"Content-Type": "application/json", TIMESTAMP: str(int(time.time()))}
        if self._key:
            headers[SIGNATURE] = signature(self._key, headers[TIMESTAMP], body)
        return headers


def signature(key: bytes, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 of the time, a full stop and the body, in hexadecimal. A service compares it, and refuses what is old."""
    return "sha256=" + hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def embedded(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a router or the kernel may take out of this one."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _port(target: httpx.URL) -> int:
    return target.port or (443 if target.scheme == "https" else 80)


def _host_header(target: httpx.URL) -> str:
    return target.netloc.decode("ascii")


def _failed(detail: str) -> Unjudged:
    return Unjudged(Outcome.ERROR, detail, cause="remote")

"""Requests to users' own services: signed, bounded in time and size, tried again, cut off while a service is down, and to public addresses only.

A name is resolved here, every address that it has is checked, and the connection goes to one that was checked: a name that resolves differently the
second time gains nothing. Redirects are not followed and proxies of the environment not used.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import httpcore
import httpx
from circuitbreaker import CircuitBreaker
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from reward_server.verifiers.verdict import Unjudged
from services.contracts.messages import Outcome

FAILURES = 5
"""In a row, after which a service is left alone."""
REST_SECONDS = 30
"""How long it is; then it is asked again, and the first answer decides."""
LONGEST_REPLY = 1 << 20
"""Bytes."""
PIECE = 1 << 16
"""Bytes that are sent between looks at the clock."""
SIGNATURE, TIMESTAMP = "X-Offbeat-Signature", "X-Offbeat-Timestamp"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNICAST = ipaddress.ip_network("2000::/3")
"""What is given out of IPv6: `is_global` lets other ranges pass, such as site-local ones and NAT64 of a network's own."""
DUMMY = ipaddress.ip_network("192.0.0.0/24")
"""Of protocols; `is_global` lets some of it pass in older versions of Python."""

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
        self._services: dict[tuple[str, str, int], tuple[httpcore.ConnectionPool, CircuitBreaker]] = {}
        self._clock = _Clock()

    def post(self, url: str, body: bytes, *, seconds: float, attempts: int) -> bytes:
        """The reply to a JSON document. `seconds` are for each attempt. Raises Unjudged."""
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL as wrong:
            raise _failed(f"{url!r} is no address: {wrong}") from wrong
        if target.scheme not in ("http", "https") or not target.host or target.userinfo:
            raise _failed(f"{url!r} must be an http or https address without a password in it")
        pool, breaker = self._service(target)
        wait = wait_exponential_jitter(multiplier=self._wait_seconds, max=5, jitter=self._wait_seconds)
        again = Retrying(stop=stop_after_attempt(attempts), wait=wait, retry=retry_if_exception_type(Unreachable), reraise=True)
        try:
            return again(partial(self._guarded, pool, breaker, target, body, seconds))
        except Unreachable as reason:
            raise _failed(f"{target.host}: {reason}") from reason

    def close(self) -> None:
        with self._lock:
            for pool, _ in self._services.values():
                pool.close()
            self._services.clear()

    def _service(self, target: httpx.URL) -> tuple[httpcore.ConnectionPool, CircuitBreaker]:
        """Connections of one service, never shared with another whose name has the same address."""
        name = (target.scheme, target.host, _port(target))
        with self._lock:
            if name not in self._services:
                pool = httpcore.ConnectionPool(_certificates(), max_connections=100, network_backend=_Backend(self._clock))
                self._services[name] = pool, CircuitBreaker(FAILURES, REST_SECONDS, Unreachable, name=target.host)
            return self._services[name]

    def _guarded(self, pool: httpcore.ConnectionPool, breaker: CircuitBreaker, target: httpx.URL, body: bytes, seconds: float) -> bytes:
        if breaker.opened:
            raise _failed(f"{target.host} failed {FAILURES} times in a row and is left alone for {breaker.open_remaining} s")
        with breaker:
            return self._once(pool, target, body, seconds)

    def _once(self, pool: httpcore.ConnectionPool, target: httpx.URL, body: bytes, seconds: float) -> bytes:
        self._clock.start(seconds)
        address = self._checked(target)
        url = httpcore.URL(scheme=target.scheme, host=address, port=target.port, target=target.raw_path)
        more = {"sni_hostname": target.host, "timeout": {"pool": seconds}}
        reply = bytearray()
        try:
            with pool.stream("POST", url, headers=list(self._headers(target, body).items()), content=body, extensions=more) as response:
                if response.status >= 500 or response.status == 429:
                    raise Unreachable(f"answered {response.status}")
                if response.status != 200:
                    redirect = " (redirects are not followed)" if 300 <= response.status < 400 else ""
                    raise _failed(f"{target.host} answered {response.status}{redirect}")
                if httpx.Headers(response.headers).get("Content-Encoding", "identity") != "identity":  # a few bytes would become gigabytes
                    raise _failed(f"{target.host} replied in a compressed form, which was not asked for")
                for part in response.iter_stream():
                    reply += part
                    if len(reply) > LONGEST_REPLY:
                        raise _failed(f"{target.host} replied with more than {LONGEST_REPLY} bytes")
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as wrong:
            raise Unreachable(f"{type(wrong).__name__}: {str(wrong)[:200]}") from wrong
        return bytes(reply)

    def _checked(self, target: httpx.URL) -> str:
        """An address of the host. One that may not be connected to is not worth another try, nor the service's failure."""
        try:
            found = [target.host] if _is_address(target.host) else self._resolve(target.host, _port(target))
        except OSError as wrong:
            raise Unreachable(f"cannot be resolved: {wrong}") from wrong
        except UnicodeError as wrong:
            raise _failed(f"{target.host[:100]!r} is no name of a host: {wrong}") from wrong
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
        usual = address not in DUMMY if address.version == 4 else address in UNICAST or address in NAT64
        return usual and address.is_global and not address.is_multicast and (inner is None or self._allowed(inner))

    def _headers(self, target: httpx.URL, body: bytes) -> dict[str, str]:
        headers = {"Host": _host_header(target), "Content-Type": "application/json", "Accept-Encoding": "identity", TIMESTAMP: str(int(time.time()))}
        if self._key:
            headers[SIGNATURE] = signature(self._key, headers[TIMESTAMP], body)
        return headers


class _Clock(threading.local):
    """When the attempt of this thread must be over."""

    over_at = 0.0

    def start(self, seconds: float) -> None:
        self.over_at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds. Raises ReadTimeout when there are none."""
        left = self.over_at - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("no whole answer in time")
        return left


class _Backend(httpcore.SyncBackend):
    """Connections that keep to the clock: the library's own time-outs are of each read, which a service that sends a byte now and then never hits."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None, socket_options: Any = None
    ) -> httpcore.NetworkStream:  # fmt: skip
        return _Stream(super().connect_tcp(host, port, self._clock.left(), local_address, socket_options), self._clock)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, clock: _Clock) -> None:
        self._inner, self._clock = inner, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._clock.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PIECE):
            self._inner.write(buffer[start : start + PIECE], self._clock.left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, self._clock.left()), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


@lru_cache(1)
def _certificates() -> ssl.SSLContext:
    return httpcore.default_ssl_context()


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

"""The verifier `remote` and the client behind it, against a real HTTP server on this machine."""

import gzip
import hashlib
import hmac
import http.server
import ipaddress
import json
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from reward_server import remote_client
from reward_server.remote_client import FAILURES, SIGNATURE, TIMESTAMP, RemoteClient
from reward_server.verifiers import VERIFIERS, check_options
from reward_server.verifiers.verdict import Tools, Unjudged, Verdict
from services.contracts.messages import Outcome

KEY = "a key of sixteen characters"
LOCAL = ("127.0.0.0/8",)


class Service(http.server.ThreadingHTTPServer):
    """Replies with what is planned, the last of it again and again."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan = [(200, b'{"score": 0.5, "detail": "half"}')]
        self.requests = []
        self.encoding = ""
        self.silent, self.silence_ends = False, threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.server.silent:
            self.server.silence_ends.wait(30)
        status, reply = self.server.plan.pop(0) if len(self.server.plan) > 1 else self.server.plan[0]
        try:
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            if self.server.encoding:
                self.send_header("Content-Encoding", self.server.encoding)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)
        except OSError:
            pass  # the client has gone

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.silence_ends.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def client():
    client = RemoteClient(key=KEY, networks=LOCAL, wait_seconds=0.001)
    yield client
    client.close()


def post(client, url, *, seconds=10.0, attempts=1, body=b"{}"):
    return client.post(url, body, seconds=seconds, attempts=attempts)


def refused(client, url, **options):
    with pytest.raises(Unjudged) as failure:
        post(client, url, **options)
    assert (failure.value.outcome, failure.value.cause) == (Outcome.ERROR, "remote")
    return str(failure.value)


def score(client, url, text="a \ud800 b", answer="gold", **options):
    checked = check_options("remote", {"url": url, **options})
    tools = Tools(lambda judge, request: pytest.fail(judge), post=client.post)
    return VERIFIERS["remote"].score(text, prompt="?", answer=answer, options=checked, tools=tools)


def test_the_service_gets_all_of_it_signed_and_its_figure_is_the_score(service, client):
    assert score(client, service.url, options={"strict": True}) == Verdict(0.5, detail="half")
    ((path, headers, body),) = service.requests
    assert path == "/score"
    assert json.loads(body) == {"prompt": "?", "completion": "a \ud800 b", "answer": "gold", "options": {"strict": True}}
    assert headers["Host"] == f"127.0.0.1:{service.server_port}"
    assert abs(int(headers[TIMESTAMP]) - time.time()) < 60
    assert headers[SIGNATURE] == "sha256=" + hmac.new(KEY.encode(), headers[TIMESTAMP].encode() + b"." + body, hashlib.sha256).hexdigest()


def test_without_a_key_requests_are_not_signed(service):
    client = RemoteClient(networks=LOCAL)
    post(client, service.url)
    assert SIGNATURE not in service.requests[0][1]
    client.close()


@pytest.mark.parametrize(
    ("reply", "why"),
    [(b"", "no score"), (b"[]", "no score"), (b'{"detail": "x"}', "no score"), (b'{"score": "1"}', "no score"), (b'{"score": NaN}', "no score")],
)
def test_a_reply_that_is_no_score_is_an_error(service, client, reply, why):
    service.plan = [(200, reply)]
    with pytest.raises(Unjudged, match=why) as failure:
        score(client, service.url)
    assert (failure.value.outcome, failure.value.cause) == (Outcome.ERROR, "remote")


def test_a_score_of_null_is_unverifiable(service, client):
    service.plan = [(200, b'{"score": null, "detail": "no such task"}')]
    assert score(client, service.url) == Verdict(None, Outcome.UNVERIFIABLE, "no such task")


def test_failures_of_the_service_are_tried_again_and_refusals_are_not(service, client):
    service.plan = [(503, b""), (429, b""), (200, b"{}")]
    assert post(client, service.url, attempts=3) == b"{}"
    assert len(service.requests) == 3
    for status in (400, 401, 404, 204):
        service.plan = [(status, b"")]
        assert f"answered {status}" in refused(client, service.url, attempts=3)
    assert len(service.requests) == 7
    service.plan = [(500, b"")]
    assert "answered 500" in refused(client, service.url, attempts=2)
    assert len(service.requests) == 9


def test_redirects_are_not_followed(service, client):
    for status in (301, 302, 307, 308):
        service.plan = [(status, b"")]
        assert "redirects are not followed" in refused(client, service.url, attempts=3)
    assert len(service.requests) == 4


def test_a_service_that_is_down_is_left_alone_and_then_asked_again(service, monkeypatch):
    monkeypatch.setattr(remote_client, "REST_SECONDS", 1)
    client = RemoteClient(networks=LOCAL, wait_seconds=0.001)
    service.plan = [(500, b"")]
    for _ in range(FAILURES):
        assert "answered 500" in refused(client, service.url)
    assert "left alone" in refused(client, service.url, attempts=5)
    assert len(service.requests) == FAILURES
    service.plan = [(200, b"{}")]
    deadline = time.monotonic() + 20
    while "left alone" in _said(client, service.url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert post(client, service.url) == b"{}"
    client.close()


def _said(client, url):
    try:
        return post(client, url).decode()
    except Unjudged as reason:
        return str(reason)


def test_a_slow_service_runs_out_of_time(service, client):
    service.silent = True
    began = time.monotonic()
    assert "Timeout" in refused(client, service.url, seconds=0.2)
    assert time.monotonic() - began < 20


def test_a_service_that_sends_a_byte_now_and_then_runs_out_of_time(client):
    """Each read ends well within the time: only all of them together do not."""
    ended = threading.Event()

    def trickle(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for i in range(300):
                try:
                    connection.sendall(b"X-Header-%d: x\r\n" % i)
                except OSError:
                    break
                time.sleep(0.1)
        ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=trickle, args=(listener,), daemon=True).start()
        began = time.monotonic()
        assert "ReadTimeout" in refused(client, f"http://127.0.0.1:{listener.getsockname()[1]}/", seconds=0.5)
        assert time.monotonic() - began < 10
        assert ended.wait(10), "the connection is closed"


def test_a_reply_without_end_is_cut_off(service, client, monkeypatch):
    monkeypatch.setattr(remote_client, "LONGEST_REPLY", 1000)
    service.plan = [(200, b"x" * 5000)]
    assert "more than 1000 bytes" in refused(client, service.url, attempts=3)
    assert len(service.requests) == 1


def test_a_compressed_reply_is_refused_before_it_is_unpacked(service, client):
    service.plan = [(200, gzip.compress(b"0" * (64 << 20)))]
    service.encoding = "gzip"
    assert "compressed" in refused(client, service.url, attempts=3)
    assert service.requests[0][1]["Accept-Encoding"] == "identity"
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255",
        "192.0.0.8", "::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:7f00:1", "::7f00:1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_never_connected_to(address):
    client = RemoteClient(resolve=lambda host, port: [address])
    assert "no public address" in refused(client, "http://rewards.example.com/", attempts=3)
    shown = f"[{address}]" if ":" in address else address
    assert "no public address" in refused(client, f"https://{shown}:8080/")


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
def test_public_addresses_are_allowed(address):
    assert RemoteClient()._allowed(ipaddress.ip_address(address))


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    client = RemoteClient(resolve=lambda host, port: ["93.184.215.14", "127.0.0.1"])
    assert "127.0.0.1, which is no public address" in refused(client, "http://rewards.example.com/")


def test_numbers_that_resolve_to_this_machine_are_refused():
    client = RemoteClient()
    for host in ("2130706433", "0x7f.1", "localhost"):
        assert "no public address" in refused(client, f"http://{host}:1/")


def test_the_connection_goes_to_the_address_that_was_checked(service):
    asked = []

    def resolve(host, port):
        asked.append((host, port))
        return ["127.0.0.1"] if len(asked) == 1 else ["192.0.2.1"]

    client = RemoteClient(networks=LOCAL, resolve=resolve)
    assert json.loads(post(client, f"http://rewards.example.com:{service.server_port}/score"))["score"] == 0.5
    assert asked == [("rewards.example.com", service.server_port)]
    assert service.requests[0][1]["Host"] == f"rewards.example.com:{service.server_port}"
    client.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(file with certificate and key, the same as trusted) of rewards.example.com."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rewards.example.com")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("rewards.example.com")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return file, ssl.create_default_context(cafile=str(file))


def test_certificates_are_checked_against_the_name_and_not_the_address(service, monkeypatch, certificate):
    file, trusted = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    service.socket = context.wrap_socket(service.socket, server_side=True)
    monkeypatch.setattr(remote_client, "_certificates", lambda: trusted)
    client = RemoteClient(networks=LOCAL, resolve=lambda host, port: ["127.0.0.1"], wait_seconds=0.001)
    assert json.loads(post(client, f"https://rewards.example.com:{service.server_port}/score"))["score"] == 0.5
    assert "CERTIFICATE_VERIFY_FAILED" in refused(client, f"https://other.example.com:{service.server_port}/score")
    assert "CERTIFICATE_VERIFY_FAILED" in refused(client, f"https://127.0.0.1:{service.server_port}/score")
    assert len(service.requests) == 1
    client.close()


def test_a_service_may_have_an_address_of_ipv6():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    said = []

    def answer():
        connection, _ = listener.accept()
        with connection:
            said.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with listener:
        threading.Thread(target=answer, daemon=True).start()
        port = listener.getsockname()[1]
        client = RemoteClient(networks=("::1/128",))
        assert post(client, f"http://[::1]:{port}/a?b=c") == b"{}"
        assert said[0].startswith(b"POST /a?b=c HTTP/1.1\r\nHost: [::1]:%d\r\n" % port)
        client.close()


def test_proxies_of_the_environment_are_not_used(service, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    client = RemoteClient(networks=LOCAL)
    assert post(client, service.url)
    client.close()


@pytest.mark.parametrize(
    "url", ["ftp://example.com", "http://", "http://user:word@example.com/", "http://exa mple.com:port/", "file:///etc/passwd", "http://\x00/"]
)
def test_what_is_no_web_address_is_refused(url):
    assert "address" in refused(RemoteClient(resolve=lambda host, port: pytest.fail("resolved")), url)


def test_a_name_that_does_not_resolve_is_an_error():
    def resolve(host, port):
        raise OSError("Name or service not known")

    assert "cannot be resolved" in refused(RemoteClient(resolve=resolve, wait_seconds=0.001), "http://nowhere.example/", attempts=2)
    assert "no name of a host" in refused(RemoteClient(), f"http://{'a' * 70}.example/", attempts=2)


def test_options_want_a_web_address_and_the_server_must_lend_its_client():
    with pytest.raises(ValueError, match="must begin with http"):
        check_options("remote", {"url": "example.com"})
    with pytest.raises(ValueError, match="appear to be an IPv4 or IPv6 network"):
        RemoteClient(networks=("lan",))
    with pytest.raises(Unjudged, match="asks no other services"):
        VERIFIERS["remote"].score(
            "", prompt="", answer=None, options=check_options("remote", {"url": "http://a"}), tools=Tools(lambda judge, request: None)
        )

"""What strangers name by an address is asked for only where that can hurt nobody."""

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time

import pytest

from tests.serve.live import NAME, asked, chat, fault, live, png, until
from tinymodal.serve.errors import ApiError
from tinymodal.serve.limits import Limits
from tinymodal.serve.remote import Fetcher, is_open

HOST = "pictures.example.org"
PICTURE = b"\x89PNG some bytes"


class Web:
    """A host on this computer that answers every connection with the same bytes, piece by piece."""

    def __init__(self, *pieces: bytes, wait_s: float = 0.0):
        self.pieces, self.wait_s, self.asked = pieces, wait_s, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            self.asked.append(connection.recv(1 << 16))
            for piece in self.pieces:
                connection.sendall(piece)
                time.sleep(self.wait_s)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def http(body: bytes = PICTURE, status: str = "200 OK", **headers: str) -> bytes:
    given = {"content-length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def fetcher(web: Web, *addresses: str, hosts=(HOST,), trusted=lambda _: True, max_s=2.0, **more) -> Fetcher:
    """One whose name server gives ``addresses``, and whose connections all lead to ``web``."""
    more.setdefault("lookups", [])
    more.setdefault("opened", [])
    lookups, opened = more["lookups"], more["opened"]

    async def lookup(host, port):
        lookups.append((host, port))
        return addresses or ("93.184.215.14",)

    async def connect(address, port, **options):
        opened.append((address, port, options.get("server_hostname")))
        return await asyncio.open_connection("127.0.0.1", web.port)

    return Fetcher(hosts, more.get("max_bytes", 1000), max_s, lookup, connect, trusted)


def get(one: Fetcher, url: str = f"http://{HOST}/a.png") -> bytes:
    return asyncio.run(one.fetch(url))


def refused(one: Fetcher, url: str = f"http://{HOST}/a.png") -> str:
    with pytest.raises(ApiError) as told:
        get(one, url)
    assert told.value.status == 400
    assert "127.0.0.1" not in told.value.message, "an address of the inside is told"
    return told.value.message


CLOSED = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.7", "198.18.0.1", "198.51.100.1", "203.0.113.9",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1",
    "2002:7f00:1::", "2002:c0a8:101::", "2001:0:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe",
]  # fmt: skip
OPEN = ["93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", CLOSED)
def test_an_address_of_the_inside_is_not_open(address):
    assert not is_open(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OPEN)
def test_an_address_of_the_internet_is_open(address):
    assert is_open(ipaddress.ip_address(address))


def test_a_picture_of_an_allowed_host_is_fetched():
    with Web(http()) as web:
        assert get(fetcher(web)) == PICTURE
        (asked_for,) = web.asked
    lines = asked_for.decode().split("\r\n")
    assert lines[0] == "GET /a.png HTTP/1.1"
    assert f"host: {HOST}" in [line.lower() for line in lines]


@pytest.mark.parametrize(
    ("addresses", "sent"),
    [(("127.0.0.1",), 0), (("93.184.215.14", "10.0.0.1"), 0), (("::ffff:127.0.0.1",), 0), ((), 1)],
)
def test_a_name_that_points_inside_is_not_asked_at_all(addresses, sent):
    opened = []
    with Web(http()) as web:
        one = fetcher(web, *addresses, trusted=is_open, opened=opened)
        with contextlib.suppress(ApiError):
            get(one)
    assert len(opened) == sent


def test_the_connection_goes_to_the_number_that_was_checked():
    """A name server that answers otherwise the second time (DNS rebinding) is never asked again."""
    lookups, opened = [], []
    with Web(http()) as web:
        get(fetcher(web, "93.184.215.14", trusted=is_open, lookups=lookups, opened=opened))
    assert lookups == [(HOST, 80)]
    assert opened == [("93.184.215.14", 80, None)]


def test_a_certificate_is_checked_against_the_name_and_not_the_number():
    opened = []
    with Web(http()) as web, contextlib.suppress(ApiError):
        get(fetcher(web, opened=opened), f"https://{HOST}/a.png")
    assert opened == [("93.184.215.14", 443, HOST)]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_not_followed(status):
    with Web(http(b"", status, location="http://169.254.169.254/latest/meta-data/")) as web:
        assert "redirects" in refused(fetcher(web))
        assert len(web.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://elsewhere.example.org/a.png",
        "http://2130706433/a.png",
        "http://0x7f000001/a.png",
        "http://0177.0.0.1/a.png",
        "http://127.1/a.png",
        "http://127.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://localhost/a.png",
        f"http://{HOST}@127.0.0.1/a.png",
        f"http://user:word@{HOST}/a.png",
        f"http://127.0.0.1#@{HOST}/a.png",
        f"http://127.0.0.1\\@{HOST}/a.png",
        f"http://{HOST}.evil.example/a.png",
        f"http://evil{HOST}/a.png",
        f"http://{HOST}:22/a.png",
        f"http://{HOST}:99999/a.png",
        f"https://{HOST}:80/a.png",
        f"http://{HOST}/a b.png",
        f"http://{HOST}/a\r\nx-injected: 1",
        f"http://{HOST}/\u00e4.png",
        "http://pictures\u3002example.org/a.png",
        f"ftp://{HOST}/a.png",
        f"gopher://{HOST}/a.png",
        "file:///etc/passwd",
        "http://",
        "http:///a.png",
        f"http://{HOST}/{'a' * 3000}",
    ],
)
def test_an_address_that_is_not_plainly_one_of_an_allowed_host_is_refused(url):
    opened = []
    with Web(http()) as web:
        refused(fetcher(web, opened=opened), url)
    assert opened == []


def test_a_host_may_be_listed_with_its_port_or_with_all_below_it():
    with Web(http()) as web:
        one = fetcher(web, hosts=(f"{HOST}:8080", "*.Example.com"))
        assert get(one, f"http://{HOST}:8080/a.png") == PICTURE
        assert get(one, "http://A.b.example.com./a.png") == PICTURE
        for url in (f"http://{HOST}/a.png", "http://example.com/a.png", "http://badexample.com/a.png"):
            refused(one, url)


@pytest.mark.parametrize("host", ["*", "*.*", "http://a.org", "a.org/", "", "*.", "a b.org", "[::1]"])
def test_a_list_of_hosts_that_means_something_else_is_refused(host):
    with pytest.raises(ValueError, match="is no host"):
        Limits(image_hosts=(host,))


def test_without_a_list_nothing_is_fetched_and_no_name_is_looked_up():
    lookups = []
    with Web(http()) as web:
        assert "data:image" in refused(fetcher(web, hosts=(), lookups=lookups))
    assert lookups == []


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([http(b"x" * 2000)], "larger"),
        ([http(b"", transfer_encoding="chunked", content_length="") + b"7d0\r\n" + b"x" * 2000], "larger"),
        ([b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 2000], "larger"),
        ([http(content_length="5000")], "larger"),
        ([http(content_encoding="gzip")], "compressed"),
        ([http(b"no", "404 Not Found")], "404"),
        ([http(b"ab", content_length="100")], "could not be fetched"),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], "could not be fetched"),
        ([b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 50_000], "could not be fetched"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\nab"], "could not be fetched"),
        ([b""], "could not be fetched"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_picture_of_the_size_is_refused(pieces, words):
    pieces = [piece.replace(b"content-length: \r\n", b"") for piece in pieces]
    with Web(*pieces) as web:
        assert words in refused(fetcher(web))


@pytest.mark.parametrize(
    "body", [[b"x"] * 100, [http(b"x" * 100)[:-100], *[b"x"] * 100]], ids=["head", "body"]
)
def test_an_answer_that_drips_is_cut_off_in_time(body):
    with Web(*body, wait_s=0.05) as web:
        began = time.monotonic()
        assert "longer than" in refused(fetcher(web, max_s=0.4))
        assert time.monotonic() - began < 1.5


def test_a_name_server_that_does_not_answer_is_given_up():
    async def never(host, port):
        await asyncio.sleep(60)

    assert "longer than" in refused(Fetcher((HOST,), 1000, 0.2, never))


def test_a_host_that_cannot_be_reached_is_told_without_its_number():
    async def inside(host, port):
        return ["127.0.0.1"]

    one = Fetcher((HOST,), 1000, 2.0, inside, trusted=lambda _: True)
    assert "could not be fetched" in refused(one, f"http://{HOST}/a.png")


def test_a_request_with_an_address_is_answered_where_the_host_is_allowed(starter):
    import PIL.Image

    url = f"http://{HOST}/red.png"
    part = {"type": "image_url", "image_url": {"url": url}}
    picture = png(PIL.Image.new("RGB", (32, 32), "red"))
    with live(starter, image_hosts=(HOST,)) as server, Web(http(picture)) as web:
        server.served.fetcher = fetcher(web, max_bytes=10_000)
        status, _, body = server.send(
            "POST", "/v1/chat/completions", chat(asked(part, "What do you see?"), max_tokens=4)
        )
        assert status == 200, body
        assert len(web.asked) == 1
        assert until(server.idle)


@pytest.mark.parametrize("url", [f"http://{HOST}/a.png", "file:///etc/passwd", "/etc/passwd", "C:\\a.png"])
def test_an_ordinary_server_reads_no_address_and_no_file(server, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    status, _, body = server.send("POST", "/v1/chat/completions", chat(asked(part, "?")))
    assert (status, fault(body)["param"]) == (400, "messages.0.content.0.image_url.url")
    assert NAME not in body.decode()

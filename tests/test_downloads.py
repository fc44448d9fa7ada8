"""Downloads: what they return, which addresses they refuse, and that no server exceeds their limits."""

import contextlib
import http.server
import os
import socket
import threading
import time

import pytest
import torch
from conftest import GOLDEN

from moss_vl import downloads
from moss_vl.checks import shorten
from moss_vl.downloads import download, is_public
from moss_vl.image_processing_moss_vl import MossVLImageProcessor
from moss_vl.image_reading import open_source
from moss_vl.video_processing_moss_vl import MossVLVideoProcessor


PHOTO = GOLDEN / "processing" / "images" / "a320x240.png"
CLIP = GOLDEN / "processing" / "media" / "v05s_320x240_30.mp4"


def fetch(url, timeout=10.0, max_bytes=10**6, allow_private_hosts=True):
    return download(url, what="image", max_bytes=max_bytes, timeout=timeout, allow_private_hosts=allow_private_hosts)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files():
    """A web server with the photo at /a.png and the clip at /b.mp4, and its requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            data = {"/a.png": PHOTO, "/b.mp4": CLIP}.get(self.path)
            self.send_response(200 if data else 404)
            self.end_headers()  # no Content-Length
            self.wfile.write(data.read_bytes() if data else b"none")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


@pytest.fixture
def raw():
    """raw(answer) -> the URL of a server that calls answer(connection, stop) after each request."""
    stop, listeners = threading.Event(), []

    def serve(answer, read_request=True):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def one(connection):
            with connection, contextlib.suppress(OSError):
                if read_request:
                    connection.recv(65536)
                answer(connection) if isinstance(answer, type(one)) else connection.sendall(answer)

        def loop():
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=loop, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    serve.stop = stop
    yield serve
    stop.set()
    for listener in listeners:
        listener.close()


# contents


def test_an_image_and_a_video_from_a_private_host(files):
    url, requests = files
    images, videos = MossVLImageProcessor(), MossVLVideoProcessor()
    allowed = {"allow_http": True, "allow_private_hosts": True}
    assert torch.equal(images(f"{url}/a.png", **allowed)["pixel_values"], images(PHOTO)["pixel_values"])
    name = "pixel_values_videos"
    assert torch.equal(videos(f"{url}/b.mp4", **allowed)[name], videos(str(CLIP))[name])
    frames = videos([[f"{url}/a.png"] * 2], video_metadata=[{"fps": 1}], **allowed)
    assert frames["video_grid_thw"][0, 0] == 2
    assert requests == ["/a.png", "/b.mp4"] + ["/a.png"] * (len(requests) - 2)
    for processor, path in ((images, "a.png"), (videos, "b.mp4")):
        count = len(requests)
        with pytest.raises(ValueError, match="would be downloaded; pass allow_http=True"):
            processor(f"{url}/{path}")
        with pytest.raises(ValueError, match=f"{path}.*private.*127.0.0.1.*pass allow_private_hosts=True"):
            processor(f"{url}/{path}", allow_http=True)
        assert len(requests) == count


def test_the_options_are_the_caller_s():
    for cls in (MossVLImageProcessor, MossVLVideoProcessor):
        made = cls(allow_http=True, allow_private_hosts=True)
        assert (
            made.resolve({}).allow_private_hosts
            and not made.resolve({"allow_private_hosts": False}).allow_private_hosts
        )
        assert "allow_private_hosts" not in made.to_dict() and "allow_http" not in made.to_dict()
        assert not cls.from_dict({**made.to_dict(), "allow_private_hosts": True}).resolve({}).allow_private_hosts
        assert cls.from_dict(made.to_dict(), allow_private_hosts=True).resolve({}).allow_private_hosts
        with pytest.raises(ValueError, match="allow_private_hosts must be True or False"):
            cls(allow_private_hosts="yes")


@pytest.mark.parametrize(
    "answer, expected",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef", b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\nX: y\r\n\r\n", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "ends after 3 of 5 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", "cannot be downloaded"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc", "cannot be downloaded"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc", "the Content-Length 'many'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc", "the Content-Length '-3'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nabc", "the Content-Length '999"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", "the Content-Length '3, 4'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000001\r\n\r\nabc", "1000001 bytes, over the limit of 1000000"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nabc", "Content-Encoding 'gzip'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "is empty"),
        (b"HTTP/1.1 404 Gone \xff\r\n\r\nabc", "HTTP status 404"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "cannot be downloaded.*headers"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000, "cannot be downloaded"),
        (b"\xff\xfe\x00", "cannot be downloaded"),
        (b"", "cannot be downloaded"),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1/a\r\n\r\n", "redirected to 'ftp://127.0.0.1/a'.*'ftp'"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "scheme 'file'"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n", "cannot be downloaded|no usable host"),
        (b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n", "redirected more than 10 times"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://u:secret@127.0.0.1/\r\n\r\n", "user or password"),
    ],
)
def test_answers(raw, answer, expected):
    url = raw(answer)
    if isinstance(expected, bytes):
        assert fetch(f"{url}/x") == expected
        return
    with pytest.raises(ValueError, match=f"image '{url}/x'.*({expected})") as caught:
        fetch(f"{url}/x")
    assert "secret" not in str(caught.value)


def test_a_redirect_is_followed(raw, files):
    url = raw(f"HTTP/1.1 307 Moved\r\nLocation: {files[0]}/a.png\r\n\r\n".encode())
    assert fetch(url) == PHOTO.read_bytes()


def test_what_is_asked(raw):
    asked = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection = listener.accept()[0]
        with connection:
            asked.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nabc")

    threading.Thread(target=serve, daemon=True).start()
    port = listener.getsockname()[1]
    assert fetch(f"http://127.0.0.1:{port}/ä b/%20?q=ö&r=1\u00a0#part") == b"abc"
    listener.close()
    assert asked[0].startswith(b"GET /%C3%A4%20b/%20?q=%C3%B6&r=1%C2%A0 HTTP/1.1\r\n")
    assert f"\r\nHost: 127.0.0.1:{port}\r\n".encode() in asked[0]


# limits


def slowly(data, stop, pause=0.05):
    def answer(connection):
        while not stop.is_set():
            connection.sendall(data)
            stop.wait(pause)

    return answer


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "first, then",
    [
        (b"", b""),
        (b"", b"H"),
        (HEAD, b"X"),
        (HEAD + b"\r\n", b"x"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_the_deadline_holds_for_every_part_of_an_answer(raw, first, then):
    def answer(connection):
        connection.sendall(first)
        slowly(then, raw.stop)(connection)

    url, start = raw(answer), time.monotonic()
    with pytest.raises(ValueError, match=f"image '{url}' took longer than 0.4 seconds"):
        fetch(url, timeout=0.4)
    assert time.monotonic() - start < 2


def test_the_deadline_holds_over_redirects(raw):
    def answer(connection):
        raw.stop.wait(0.15)
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n")

    with pytest.raises(ValueError, match="longer than 0.4 seconds"):
        fetch(raw(answer), timeout=0.4)


def test_the_deadline_holds_for_a_tls_handshake_and_a_lookup(raw, monkeypatch):
    url = raw(lambda connection: raw.stop.wait(20))
    with pytest.raises(ValueError, match="longer than 0.3 seconds"):
        fetch(url.replace("http:", "https:"), timeout=0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: raw.stop.wait(20))
    with pytest.raises(ValueError, match="longer than 0.3 seconds"):
        fetch("http://slow.example/", timeout=0.3)


@pytest.mark.parametrize("data, message", [(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "bytes of headers")])
def test_headers_are_bounded(raw, data, message):
    with pytest.raises(ValueError, match=message):
        fetch(raw(slowly(data, raw.stop, pause=0)))


def test_a_body_is_bounded(raw):
    def answer(connection):
        connection.sendall(HEAD + b"\r\n")
        slowly(b"x" * 65536, raw.stop, pause=0)(connection)

    url = raw(answer)
    with pytest.raises(ValueError, match="over the limit of 1000000"):
        open_source(url, what="image", allow_http=True, allow_private_hosts=True, max_bytes=10**6)


# addresses


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("93.184.216.34", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("::", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::808:808", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),  # Teredo of 127.0.0.1
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("fd12:3456::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "0", "localhost", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_all_spellings_of_a_private_host_are_refused(host):
    with pytest.raises(ValueError, match="private or reserved address|not found"):
        fetch(f"http://{host}:9/", allow_private_hosts=False)


@pytest.fixture
def resolver(monkeypatch):
    """Sets the addresses of all hosts; `resolver.asked` lists the lookups."""

    def give(*addresses):
        def look_up(host, port, **_):
            give.asked.append(host)
            return [
                (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port))
                for one in addresses
            ]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    give.asked = []
    return give


def test_a_name_of_a_private_address_is_refused(resolver):
    resolver("169.254.169.254", "::1")
    with pytest.raises(ValueError, match=r"'http://cloud.example/a'.*cloud.example' is 169.254.169.254, ::1"):
        fetch("http://cloud.example/a", allow_private_hosts=False)


def test_a_redirect_to_a_private_address_is_refused(raw, files, monkeypatch):
    """The first server stands for a public one."""
    url = raw(f"HTTP/1.1 302 Found\r\nLocation: {files[0]}/a.png\r\n\r\n".encode())
    checked = []
    monkeypatch.setattr(downloads, "is_public", lambda address: checked.append(address) or len(checked) == 1)
    with pytest.raises(ValueError, match=f"'{url}' .redirected to '{files[0]}/a.png'. is at a private"):
        fetch(url, allow_private_hosts=False)
    assert files[1] == [] and len(checked) == 2


def test_the_checked_address_is_connected_and_no_other(resolver, monkeypatch):
    """One lookup; private addresses beside public ones are left out."""
    resolver("10.0.0.1", "93.184.216.34")
    connected = []

    def connect(self, address):
        connected.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ValueError, match="cannot be downloaded: refused"):
        fetch("http://both.example:81/", allow_private_hosts=False)
    assert resolver.asked == ["both.example"] and connected == [("93.184.216.34", 81)]


def test_tls_asks_for_the_name_of_the_host(resolver):
    """Also if the connection goes to an address: the server name is in the first message of TLS."""
    hello, listener = [], socket.create_server(("127.0.0.1", 0))

    def serve():
        connection = listener.accept()[0]
        with connection:
            hello.append(connection.recv(65536))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    resolver("127.0.0.1")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        fetch(f"https://b\u00fccher.example:{listener.getsockname()[1]}/")
    thread.join(5)
    listener.close()
    assert b"xn--bcher-kva.example" in hello[0]


def test_a_proxy_may_look_up_names_only_if_it_is_allowed(raw, monkeypatch):
    asked = []

    def answer(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")

    monkeypatch.setenv("http_proxy", raw(answer).replace("http://", "http://me:pass@"))
    with pytest.raises(ValueError, match="goes through the proxy 127.0.0.1.*allow_private_hosts=True") as caught:
        fetch("http://any.example/a", allow_private_hosts=False)
    assert "pass@" not in str(caught.value) and not asked
    with pytest.raises(ValueError, match="private or reserved"):
        fetch("http://10.0.0.1/a", allow_private_hosts=False)
    assert fetch("http://any.example/a") == b"abc"
    assert os.environ["http_proxy"]


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b/x",
        "http://[::1/x",
        "http://[::1]x/x",
        "http://[zz]/x",
        "http:///x",
        "http:x",
        "http://",
        "http://:80/x",
        "http://a:99999/x",
        "http://a:b/x",
        "http://a b/x",
        "http://a\u2100b/x",
        "http://" + "a" * 300 + "/x",
        "http://" + "a" * 100000 + "\u00e4/x",
        "http://\ud800/x",
        "http://127.0.0.1/\ud800",
        "http://user:secret@127.0.0.1/x",
        "https://user:secret@a..b/x",
        "http://user:sec/ret@127.0.0.1/x",
        "http://user:sec#ret@127.0.0.1/x",
        "http://127.0.0.1\\@a/x",
    ],
)
def test_odd_urls_are_named_errors(url):
    for read in (lambda: fetch(url), lambda: open_source(url, what="image"), lambda: MossVLImageProcessor()(url)):
        with pytest.raises(ValueError, match="image ['\"]http") as caught:
            read()
        text = str(caught.value)
        assert type(caught.value) is ValueError and "secret" not in text and "ret@" not in text and len(text) < 2500


def test_urls_are_shown_without_their_login():
    for url, shown in [
        ("https://u:p@host/a", "https://host/a"),
        ("https://u@host/a@b", "https://host/a@b"),
        ("https://host/@user/a", "https://host/@user/a"),
        ("https://host:8080/@user", "https://host:8080/@user"),
        ("https://[::1]:80/@user", "https://[::1]:80/@user"),
        ("http://u:a/b@host/", "http://host/"),
        ("mail me: a@b", "mail me: a@b"),
    ]:
        assert shorten(url) == repr(shown)

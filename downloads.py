"""Downloads over http and https: bounded in bytes and seconds, and without private addresses unless they are allowed.

The name of a host is looked up once, its addresses are checked, and the connection goes to a checked address.
Redirects are checked in the same way.
"""

import base64
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass

from .checks import shorten


MAX_REDIRECTS = 10
MAX_HEADER_BYTES = 2**18  # of one response, `100 Continue` included
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
SAFE_CHARACTERS = "%/:=&?~#+!$,;'@()*[]|"  # of a URL, as it is sent
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses inside IPv6 addresses
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
DOCUMENTATION_IPV6 = ipaddress.ip_network("3fff::/20")


def download(url: str, *, what: str, max_bytes: int, timeout: float, allow_private_hosts: bool = False) -> bytes:
    """The body of an http or https URL. Follows redirects.

    Args:
        what: "image" or "video", for messages.
        max_bytes: limit for the body.
        timeout: seconds from the lookup of the host to the last byte, redirects included.
        allow_private_hosts: True allows private, loopback, link-local, multicast and reserved addresses, and a proxy
            that looks up names itself.

    Raises ValueError for everything that goes wrong. Messages have the URL without its user and password.
    """
    clock = _Deadline(timeout)
    name, target = f"{what} {shorten(url, 500)}", url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            response = _get(_read_url(target), clock, allow_private_hosts)
            try:
                location = response.headers.get("Location")
                if response.status not in REDIRECTS or location is None:
                    return _read_body(response, max_bytes)
            finally:
                response.close()
            location = urllib.parse.quote(location.strip().encode("latin-1", "replace"), safe=SAFE_CHARACTERS)
            target = urllib.parse.urljoin(target, location)
        raise _Failed(f"is redirected more than {MAX_REDIRECTS} times")
    except TimeoutError:
        raise ValueError(f"{name} took longer than {timeout:g} seconds to download") from None
    except _Failed as error:
        at = "" if target == url else f" (redirected to {shorten(target, 500)})"
        raise ValueError(f"{name}{at} {error}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        at = "" if target == url else f" (redirected to {shorten(target, 500)})"
        reason = error.reason if isinstance(error, UnicodeError) else error
        detail = printable(str(reason)) or type(error).__name__
        raise ValueError(f"{name}{at} cannot be downloaded: {detail[:500]}") from error


def printable(text: str) -> str:
    """The text with control characters escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class _Failed(Exception):
    """The end of a message that begins with the URL."""


class _Deadline:
    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the deadline. TimeoutError if it has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left


# URLs and addresses


@dataclass(frozen=True)
class _Url:
    scheme: str
    host: str  # ASCII, without brackets
    port: int
    target: str  # path and query, percent-encoded

    def authority(self, always_port: bool = False) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] and not always_port else f"{host}:{self.port}"


def _read_url(url: str) -> _Url:
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _Failed(f"has no usable host: {error}") from None
    if parts.scheme not in PORTS:
        raise _Failed(f"cannot be downloaded: expected an http or https URL, got the scheme {shorten(parts.scheme)}")
    if "@" in parts.netloc:
        raise _Failed("has a user or password; expected a URL without them")
    try:
        host = (host or "")[:1000]
        ascii_host = host if ":" in host else host.encode("idna").decode("ascii")
    except UnicodeError:
        ascii_host = ""
    if (
        not 0 < len(ascii_host) <= 253
        or not ascii_host.isascii()
        or any(c.isspace() or not c.isprintable() for c in ascii_host)
    ):
        raise _Failed(f"has no usable host: {shorten(host or '')}")
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    target = target if target.startswith("/") else f"/{target}"
    try:
        target = urllib.parse.quote(target, safe=SAFE_CHARACTERS)
    except UnicodeError:
        raise _Failed("has characters that no URL can hold") from None
    return _Url(parts.scheme, ascii_host, PORTS[parts.scheme] if port is None else port, target)


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet: not private, loopback, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not (ip.is_multicast or ip.is_reserved)
    if ip in NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip.ipv4_mapped is not None:
        return is_public(str(ip.ipv4_mapped))
    is_global = ip in GLOBAL_IPV6 and ip not in DOCUMENTATION_IPV6 and ip.is_global
    return is_global and all(is_public(str(one)) for one in inner if one is not None)


def _addresses(host: str, port: int, clock: _Deadline) -> list[tuple]:
    """(family, socket address) of a host, in the order of the resolver. The lookup itself has no time limit, so it
    runs in a thread that is left alone after the deadline."""
    found: list = []

    def look_up():
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(clock.left())
    if not found:
        raise TimeoutError("the host was not found in time")
    if isinstance(found[0], Exception):
        raise _Failed(f"cannot be downloaded: the host {shorten(host)} is not found: {found[0]}")
    return [(family, address) for family, _, _, _, address in found[0]]


def _require_public(addresses: list[tuple], host: str) -> list[tuple]:
    public = [(family, address) for family, address in addresses if is_public(address[0])]
    if not public:
        got = ", ".join(sorted({address[0] for _, address in addresses})[:4])
        raise _Failed(
            f"is at a private or reserved address ({shorten(host)} is {got}); pass allow_private_hosts=True to allow "
            "that, in the call or to the processor's from_pretrained"
        )
    return public


# the connection


def _get(url: _Url, clock: _Deadline, allow_private_hosts: bool) -> http.client.HTTPResponse:
    """The response to a GET request, with its headers read. The caller closes it."""
    proxy = _proxy_of(url)
    sock = _connect(url, proxy, clock, allow_private_hosts)
    try:
        head = {}
        if proxy is not None and url.scheme == "https":
            _tunnel(sock, url, proxy, clock)
        elif proxy is not None:
            head = proxy.headers
        if url.scheme == "https":
            sock.settimeout(clock.left())
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=url.host)
        target = url.target if proxy is None or url.scheme == "https" else f"http://{url.authority()}{url.target}"
        head = {
            "Host": url.authority(),
            "User-Agent": "moss-vl",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **head,
        }
        response = _ask(sock, f"GET {target} HTTP/1.1", head, clock)
    except BaseException:
        sock.close()
        raise
    return response


def _connect(url: _Url, proxy, clock: _Deadline, allow_private_hosts: bool) -> socket.socket:
    if proxy is not None:
        if not allow_private_hosts:
            try:
                _require_public([(0, (str(ipaddress.ip_address(url.host)),))], url.host)
            except ValueError:
                raise _Failed(
                    f"goes through the proxy {proxy.host}:{proxy.port} of the environment, which looks up the host "
                    "itself, so that a private address cannot be excluded; pass allow_private_hosts=True if the proxy "
                    "may reach every host"
                ) from None
        addresses = _addresses(proxy.host, proxy.port, clock)
    else:
        addresses = _addresses(url.host, url.port, clock)
        if not allow_private_hosts:
            addresses = _require_public(addresses, url.host)
    failure: OSError | None = None
    for index, (family, address) in enumerate(addresses):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # a share of the time per address, so that one that does not answer leaves time for the next
            sock.settimeout(clock.left() / (len(addresses) - index))
            sock.connect(address)
            return sock
        except OSError as error:
            failure = error
            sock.close()
    clock.left()
    raise _Failed(f"cannot be downloaded: {failure}")


def _ask(sock: socket.socket, line: str, headers: dict, clock: _Deadline) -> http.client.HTTPResponse:
    request = "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items()), "", ""])
    sock.settimeout(clock.left())
    sock.sendall(request.encode("ascii"))
    reader = _TimedReader(sock, clock, MAX_HEADER_BYTES)
    response = http.client.HTTPResponse(reader, method="GET")
    response.begin()
    reader.limit = None
    return response


class _TimedReader(io.RawIOBase):
    """Reads a socket until the deadline, and at most `limit` bytes. It stands for the socket of an HTTPResponse, which
    closes both."""

    def __init__(self, sock: socket.socket, clock: _Deadline, limit: int | None):
        super().__init__()
        self._sock, self._clock, self.limit, self._count = sock, clock, limit, 0

    def makefile(self, mode):
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        self._sock.settimeout(self._clock.left())
        count = self._sock.recv_into(buffer)
        self._count += count
        if self.limit is not None and self._count > self.limit:
            raise _Failed(f"sends more than {self.limit} bytes of headers")
        return count

    def close(self):
        if not self.closed:
            self._sock.close()
        super().close()


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """The body, not longer than `max_bytes` and not shorter than its Content-Length."""
    if not 200 <= response.status < 300:
        raise _Failed(f"cannot be downloaded: HTTP status {response.status} {shorten(response.reason)}")
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise _Failed(f"is sent with the Content-Encoding {shorten(encoding)}, which was not asked for")
    sizes = {size.strip() for size in response.headers.get_all("Content-Length", ())}
    if sizes and not response.chunked:
        [size] = sizes if len(sizes) == 1 else [", ".join(sorted(sizes))]
        if not (size.isascii() and size.isdigit()) or len(size) > 18:
            raise _Failed(f"has the Content-Length {shorten(size)}; expected a number of bytes")
        if int(size) > max_bytes:
            raise _Failed(f"has {int(size)} bytes, over the limit of {max_bytes}")
    data = bytearray()
    while chunk := response.read1(2**16):
        data += chunk
        if len(data) > max_bytes:
            raise _Failed(f"is over the limit of {max_bytes} bytes")
    if response.length:
        raise _Failed(f"ends after {len(data)} of {len(data) + response.length} bytes")
    if not data:
        raise _Failed("is empty")
    return bytes(data)


# proxies


@dataclass(frozen=True)
class _Proxy:
    host: str
    port: int
    headers: dict


def _proxy_of(url: _Url) -> _Proxy | None:
    """The proxy that the environment names for a URL (`http_proxy`, `https_proxy`, `no_proxy`), as for urllib."""
    address = urllib.request.getproxies().get(url.scheme)
    if not address or urllib.request.proxy_bypass(url.authority()):
        return None
    parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
    try:
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if parts.scheme != "http" or not host:
        raise _Failed(f"needs a proxy that is not understood: {shorten(address)}; expected http://host:port")
    headers = {}
    if parts.username is not None:
        login = ":".join(urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    return _Proxy(host, port, headers)


def _tunnel(sock: socket.socket, url: _Url, proxy: _Proxy, clock: _Deadline) -> None:
    """Asks a proxy for a connection to the host. Reads single bytes, because what follows belongs to the host."""
    authority = url.authority(always_port=True)
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in proxy.headers.items()]
    sock.settimeout(clock.left())
    sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    answer = bytearray()
    while not answer.endswith(b"\r\n\r\n"):
        sock.settimeout(clock.left())
        byte = sock.recv(1)
        if not byte or len(answer) > MAX_HEADER_BYTES:
            raise _Failed(f"cannot be downloaded: the proxy {proxy.host}:{proxy.port} does not answer CONNECT")
        answer += byte
    status = bytes(answer).split(b"\r\n", 1)[0].decode("latin-1")
    if status.split()[1:2] != ["200"]:
        raise _Failed(f"cannot be downloaded: the proxy {proxy.host}:{proxy.port} answers {shorten(status)}")

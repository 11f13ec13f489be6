"""Refuses requests that other web sites make, and uploads that stop half-way (ASGI middleware)."""

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

PAUSE = 20  # seconds without a byte of an upload
LONGEST_UPLOAD = 300  # seconds


class Guard:
    """Middleware that answers only requests meant for this page.

    - The Host header must be an IP address, localhost, this machine's name or one of `hosts`. Another name would be a
      web site's that lets its own name point here (DNS rebinding).
    - The Origin header, where there is one, must be the page's own: other sites can neither upload nor run anything.
    - A body that pauses for `pause` seconds, or takes more than `longest`, is given up, its temporary file deleted.

    Args:
        hosts: further names, those of proxies; one that begins with a dot stands for all names that end so.
        pause, longest: seconds.
        address: the name or address that the page listens on.
    """

    def __init__(self, app, hosts=(), pause=PAUSE, longest=LONGEST_UPLOAD, address="localhost"):
        self.app, self.pause, self.longest = app, pause, longest
        self.proxied = {host.lower() for host in hosts}
        self.hosts = {"localhost", address.lower(), socket.gethostname().lower(), *self.proxied}

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self.is_allowed_host(host_of(headers.get("host", ""))):
            refusal = "This page is not served under this name: start it with --allow-host NAME."
        elif not self.is_same_origin(headers):
            refusal = "Requests of other web sites are refused."
        else:
            return await self.app(scope, self.timed(receive), send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await PlainTextResponse(refusal, status_code=403)(scope, receive, send)

    def is_allowed_host(self, host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host in self.hosts or any(name[0] == "." and host.endswith(name) for name in self.hosts if name)
        return True

    def is_same_origin(self, headers):
        """Whether a request comes from a page under its own Host, or from no page.

        X-Forwarded-Host stands in for Host only with a name of `hosts`: sites can set it, too.
        """
        if "origin" not in headers:
            return True
        forwarded = headers.get("x-forwarded-host", "")
        own = {headers.get("host", ""), forwarded if host_of(forwarded) in self.proxied else ""} - {""}
        scheme, _, netloc = headers["origin"].lower().partition("://")
        port = {"http": ":80", "https": ":443"}.get(scheme, "")
        return netloc in {name for host in own for name in (host.lower(), host.lower().removesuffix(port))}

    def timed(self, receive):
        """`receive` for a request: the parts of its body in time, or MultiPartException, which deletes what came."""
        complete, end = False, None

        async def receive_in_time():
            nonlocal complete, end
            if complete:  # what follows is the end of the connection
                return await receive()
            now = asyncio.get_running_loop().time()
            end = now + self.longest if end is None else end
            try:
                message = await asyncio.wait_for(receive(), max(0.0, min(self.pause, end - now)))
            except TimeoutError:
                raise MultiPartException("The upload took too long.") from None
            complete = not message.get("more_body", False)
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload was broken off.")
            return message

        return receive_in_time


def host_of(netloc):
    """The host name in "name:port" or "[address]:port", lower case; "" for what is neither."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""

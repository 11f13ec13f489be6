"""Refuses requests from other web sites and uploads that stall (ASGI middleware)."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAUSE = 20  # longest time without a byte of an upload, in seconds
LONGEST_UPLOAD = 300  # seconds


class Guard:
    """Middleware that answers only requests meant for this page.

    - The Host header must be an IP address, localhost, the name of this machine or one of `hosts`. Any other name may
      belong to a web site whose name resolves to this machine (DNS rebinding).
    - The Origin header, if present, must be that of the page: other sites can neither upload nor run anything.
    - A request body that pauses for `pause` seconds, or takes more than `longest`, is refused and its temporary file
      deleted.

    Args:
        hosts: further names, those of proxies; one that begins with a dot allows all names with this ending.
        pause, longest: in seconds.
        address: the name or address that the page listens on.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Sequence[str] = (),
        pause: float = PAUSE,
        longest: float = LONGEST_UPLOAD,
        address: str = "localhost",
    ) -> None:
        self.app, self.pause, self.longest = app, pause, longest
        self.proxied = {host.lower() for host in hosts}
        self.hosts = {"localhost", address.lower(), socket.gethostname().lower(), *self.proxied}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self.is_allowed_host(host_of(headers.get("host", ""))):
            refusal = "This page is not served under this name: start it with --allow-host NAME."
        elif not self.is_same_origin(headers):
            refusal = "Requests from other web sites are refused."
        else:
            return await self.app(scope, self.timed(receive), send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await PlainTextResponse(refusal, status_code=403)(scope, receive, send)

    def is_allowed_host(self, host: str) -> bool:
        """True for IP addresses and the allowed names."""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host in self.hosts or any(name[0] == "." and host.endswith(name) for name in self.hosts if name)
        return True

    def is_same_origin(self, headers: Headers) -> bool:
        """True for a request from a page under its own Host, or from no page.

        X-Forwarded-Host replaces Host only with a name of `hosts`, because web sites can set it as well.
        """
        if "origin" not in headers:
            return True
        forwarded = headers.get("x-forwarded-host", "")
        own = {headers.get("host", ""), forwarded if host_of(forwarded) in self.proxied else ""} - {""}
        scheme, _, netloc = headers["origin"].lower().partition("://")
        port = {"http": ":80", "https": ":443"}.get(scheme, "")
        return netloc in {name for host in own for name in (host.lower(), host.lower().removesuffix(port))}

    def timed(self, receive: Receive) -> Receive:
        """`receive` with time limits; raises MultiPartException, which deletes the partial upload."""
        complete, end = False, 0.0

        async def receive_in_time() -> Message:
            nonlocal complete, end
            if complete:  # only the end of the connection can follow
                return await receive()
            now = asyncio.get_running_loop().time()
            end = end or now + self.longest
            try:
                message = await asyncio.wait_for(receive(), max(0.0, min(self.pause, end - now)))
            except TimeoutError:
                raise MultiPartException("The upload took too long.") from None
            complete = not message.get("more_body", False)
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload was interrupted.")
            return message

        return receive_in_time


def host_of(netloc: str) -> str:
    """The host name in "name:port" or "[address]:port", lower case; "" for anything else."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""

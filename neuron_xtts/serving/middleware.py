"""Around every request: an id, a key if one is asked for, and a limit on what is read of it."""

from __future__ import annotations

import base64
import hmac
import logging
import re
import uuid
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuron_xtts.serving.errors import ApiError, as_api_error

logger = logging.getLogger(__name__)

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
#: Paths that are answered without a key: whoever asks whether a server is there has none.
OPEN = frozenset({"/health"})
#: What is for people: whose browser asks them for a key, as the password of anybody.
PAGE = "/ui"
#: What is needed of Gradio below that. Its API, which no event of the page calls, stores what it is sent, decodes it,
#: and copies files of this machine that it is told the names of.
_OF_PAGE = re.compile(r"|/|/config|/theme\.css|/(assets|static)/.*")
_COOKIE = "neuron_xtts"


class Gate:
    """Lets requests in.

    Args:
        app: that answers them.
        keys: one of which a request must have; none: every one is let in.
        most: bytes of a body.
        most_of: the same for some paths.
        origins: of web pages that may call, beside those of this server itself; ``*`` is any.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Collection[str] = (),
        most: int,
        most_of: Mapping[str, int] | None = None,
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._most = most
        self._most_of = dict(most_of or {})
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, in terms of ASGI."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False
        path, cookie = _path(scope), self._cookie(headers)

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = request_id
                if message["status"] == 401 and path.startswith(PAGE):  # a browser asks its user for it
                    sent["www-authenticate"] = 'Basic realm="neuron_xtts", charset="UTF-8"'
                elif cookie:
                    sent.append("set-cookie", cookie)
                if path.startswith(PAGE):
                    sent["content-security-policy"] = "frame-ancestors 'self'"
            await send(message)

        try:
            if not self._knows(headers, path):
                raise ApiError(401, "The API key is missing or wrong; expected Authorization: Bearer KEY")
            if not self._is_welcome(headers, path):
                raise ApiError(403, "A page of elsewhere may not call this server, but for those of --allow-origin")
            if path.startswith(PAGE) and not _OF_PAGE.fullmatch(path.removeprefix(PAGE)):
                raise ApiError(403, "That is no part of the page; a voice is added by POST /v1/audio/voices")
            await self._app(scope, self._limited(path, headers, receive), answer)
        except Exception as error:
            if begun:  # nothing but the connection's end can say it
                logger.error("request %s failed while it was answered", request_id)
                raise
            await as_api_error(error).response()(scope, receive, answer)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if not self._knows(headers, _path(scope)) or not self._is_welcome(headers, _path(scope)):
            await receive()  # that it connects
            await send({"type": "websocket.close", "code": 1008, "reason": "no valid API key, or a page of elsewhere"})
            return
        await self._app(scope, receive, send)

    def _knows(self, headers: Headers, path: str) -> bool:
        if not self._keys or path in OPEN:
            return True
        if self._is_key(_given(headers)):
            return True
        token = cookie_parser(headers.get("cookie", "")).get(_COOKIE, "")
        return sum(hmac.compare_digest(token.encode(), _token(key).encode()) for key in self._keys) > 0

    def _is_key(self, given: bytes) -> bool:
        # All of them, so that the time says nothing.
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0

    def _cookie(self, headers: Headers) -> str | None:
        """What a browser that was given a key is to bring from now on; its pages cannot read it, nor others use it."""
        given = _given(headers)
        if not headers.get("authorization", "").lower().startswith("basic ") or not self._is_key(given):
            return None
        return f"{_COOKIE}={_token(given)}; Path=/; HttpOnly; SameSite=Strict"

    def _is_welcome(self, headers: Headers, path: str) -> bool:
        """Whether a page that calls is ours: browsers ask nobody before they send a form or open a WebSocket."""
        origin, referer = headers.get("origin"), headers.get("referer", "")
        page = origin or "/".join(referer.split("/")[:3])
        if "*" in self._origins or page in self._origins:
            return True
        if (site := headers.get("sec-fetch-site")) is not None:  # browsers say it here, whatever name a proxy has
            ours = site in ("same-origin", "none")
            ours |= bool(self._origins) and not page and headers.get("sec-fetch-dest") == "audio"  # that names no page
        else:
            ours = not page or page.partition("//")[2] == headers.get("host")
        return ours or (origin is None and path.rstrip("/") in ("", PAGE))  # or has a link to it

    def _limited(self, path: str, headers: Headers, receive: Receive) -> Receive:
        most = self._most_of.get(path.rstrip("/"), self._most)
        said = headers.get("content-length", "0")
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most or (said.isdecimal() and int(said) > most):
                raise HTTPException(413, f"The body is too large; expected at most {most} bytes")
            return message

        return limited


def _path(scope: Scope) -> str:
    """Of a request, from where the application is mounted on."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _given(headers: Headers) -> bytes:
    """The key of a request, as a token, or as the password of anybody."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            pass
    return b""


def _token(key: bytes) -> str:
    return hmac.new(key, b"the page of neuron_xtts", "sha256").hexdigest()

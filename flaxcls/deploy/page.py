"""The page in the browser: its files, what it asks for over HTTP, and who may ask.

The page is written by hand and served by Starlette and uvicorn, of the extra `app`: four files that
lie in this package, read once. There is no address that names a file of this machine, and an
upload is held in memory alone, so that nothing outside of a run folder can be read or written. A
content security policy forbids the browser to ask any other host for anything. What other pages in
the same browser send, under whatever name of this machine, is refused.
"""

import asyncio
import base64
import binascii
import importlib.resources
import ipaddress
import json
import math
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flaxcls.deploy.answers import Answer, Answers
from flaxcls.errors import InputError

LARGEST_PICTURE = 20 * 2**20  # bytes
LARGEST_LESSON = 48 * 2**20  # 20 squares of 512 px in base64
# What is larger is read to its end, so that the browser shows the answer instead of "failed".
_MOST_THROWN_AWAY = 256 * 2**20
_SECONDS_TO_SEND = 120
_MOST_AT_ONCE = 16  # uploads that are in memory at a time
_AT_WORK = 2  # of them, those that are decoded and predicted
_SECONDS_TO_START = 30

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; media-src blob: mediastream:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
# Address: package, file, type.
_FILES = {
    "/": ("flaxcls.deploy", "app.html", "text/html; charset=utf-8"),
    "/app.js": ("flaxcls.deploy", "app.js", "text/javascript; charset=utf-8"),
    "/app.css": ("flaxcls.deploy", "app.css", "text/css; charset=utf-8"),
    "/page.css": ("flaxcls.analysis", "page.css", "text/css; charset=utf-8"),
}

Endpoint = Callable[[Request], Awaitable[Response]]


class PageServer:
    """Serves the page from a thread of its own until `stop`.

    Args:
      answers: what the page asks.
      listener: a socket that listens.
      names: host names under which the page may be asked for, besides addresses and localhost.
    """

    def __init__(self, answers: Answers, listener: socket.socket, names: tuple[str, ...] = ()):
        self._listener = listener
        config = uvicorn.Config(
            create_app(answers, names),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])

    def start(self) -> None:
        """Returns as soon as the page is answered."""
        self._thread.start()
        deadline = time.monotonic() + _SECONDS_TO_START
        while self.is_running and not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Waits until it has ended, at most for so long."""
        self._thread.join(seconds)

    def stop(self) -> None:
        """Ends it; answers that are being made get two seconds."""
        self._server.should_exit = True
        self._thread.join(4)


def create_app(answers: Answers, names: tuple[str, ...] = ()) -> ASGIApp:
    """Returns the ASGI application of the page.

    Args: as `PageServer`.
    """
    api = _Api(answers)
    routes = [Route(path, _file(*what), methods=["GET"]) for path, what in _FILES.items()]
    routes += [
        Route("/api/runs", _in_words(api.runs), methods=["GET"]),
        Route("/api/look", _in_words(api.look), methods=["POST"]),
        Route("/api/example", _in_words(api.example), methods=["POST"]),
        Route("/api/teach", _in_words(api.teach), methods=["POST"]),
        Route("/api/lesson", _in_words(api.lesson), methods=["GET"]),
    ]
    errors: dict[Any, Any] = {404: _nothing_here, 405: _nothing_here}
    return _Guard(Starlette(routes=routes, exception_handlers=errors), names)


class _TooLarge(Exception):
    """An upload has more bytes than are taken; the message says it in words."""


class _Api:
    """What the page asks; each method answers one address."""

    def __init__(self, answers: Answers):
        self._answers = answers
        self._uploads = 0
        self._at_work = asyncio.Semaphore(_AT_WORK)

    async def runs(self, request: Request) -> Answer:
        del request
        answers = self._answers
        return {
            "runs": [run.describe() for run in answers.runs],
            "largest": LARGEST_PICTURE,
        }

    async def look(self, request: Request) -> Answer:
        run = self._answers.run(_number(request, "run"))
        wanted = _number(request, "class") if "class" in request.query_params else None
        method = request.query_params.get("method", "auto")
        invert = _invert(request)
        return await self._with_upload(
            request,
            LARGEST_PICTURE,
            lambda content: run.look(content, method=method, wanted=wanted, invert=invert),
        )

    async def example(self, request: Request) -> Answer:
        run = self._answers.run(_number(request, "run"))
        invert = _invert(request)
        return await self._with_upload(
            request, LARGEST_PICTURE, lambda content: run.example(content, invert=invert)
        )

    async def teach(self, request: Request) -> Answer:
        return await self._with_upload(request, LARGEST_LESSON, self._begin_lesson)

    async def lesson(self, request: Request) -> Answer:
        return self._answers.lesson(_number(request, "number"))._asdict()

    def _begin_lesson(self, content: bytes) -> Answer:
        wish = _wish(content)
        number = self._answers.begin_lesson(
            wish["run"],
            wish["name"],
            wish["squares"],
            method=wish["method"],
            parent=wish["parent"],
        )
        return {"number": number}

    async def _with_upload(
        self, request: Request, largest: int, answer: Callable[[bytes], Answer]
    ) -> Answer:
        """Returns the answer to what is sent, made in a thread."""
        if self._uploads >= _MOST_AT_ONCE:
            raise InputError("the page has too much to do; try again in a moment")
        self._uploads += 1
        try:
            async with asyncio.timeout(_SECONDS_TO_SEND):
                content = await _body(request, largest)
            async with self._at_work:
                return await run_in_threadpool(answer, content)
        finally:
            self._uploads -= 1


def _in_words(answer: Callable[[Request], Awaitable[Answer]]) -> Endpoint:
    """Makes an endpoint whose refusals are sentences: {"refused": ...}.

    What is wrong with a picture is an answer like another, of status 200: for any other status the
    browser writes an error to its console.
    """

    async def endpoint(request: Request) -> Response:
        try:
            return _json(await answer(request))
        except InputError as error:
            return _json({"refused": str(error)})
        except _TooLarge as error:
            return _json({"refused": str(error)}, 413)
        except TimeoutError:
            return _json({"refused": "the file came too slowly; try a smaller one"}, 408)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception:
            traceback.print_exc()
            sentence = "the page could not answer, by a mistake in flaxcls; its terminal says more"
            return _json({"refused": sentence}, 500)

    return endpoint


async def _body(request: Request, largest: int) -> bytes:
    """Returns what is sent, of which no more than `largest` bytes are ever held."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= largest:
            parts.append(part)
            continue
        parts.clear()
        if size > _MOST_THROWN_AWAY:
            break
    if size > largest:
        raise _TooLarge(
            f"the file has more than {largest // 2**20} MB, which is what the page takes; make it "
            "smaller"
        )
    return b"".join(parts)


def _wish(content: bytes) -> dict[str, Any]:
    """Returns what class is to be taught, from JSON of five keys.

    Raises:
      InputError: it is anything else.
    """
    try:
        wish = json.loads(content)
        if not isinstance(wish, dict) or wish.keys() != _WISH.keys():
            raise ValueError
        for key, kinds in _WISH.items():
            if not isinstance(wish[key], kinds) or isinstance(wish[key], bool):
                raise ValueError
        squares = [
            base64.b64decode(square.removeprefix("data:image/png;base64,"), validate=True)
            for square in wish["squares"]
        ]
    except (ValueError, AttributeError, RecursionError, binascii.Error) as error:
        raise InputError("the page was not understood; load it again") from error
    return {**wish, "squares": squares}


_WISH: dict[str, Any] = {
    "run": int,
    "name": str,
    "parent": str | None,
    "method": str,
    "squares": list,
}


def _number(request: Request, name: str) -> int:
    value = request.query_params.get(name, "")
    if not (value.isascii() and value.isdecimal() and len(value) < 8):
        raise InputError(f"{name} is no number; load the page again")
    return int(value)


def _invert(request: Request) -> str:
    return request.query_params.get("invert", "auto")


def _json(answer: Answer, status: int = 200) -> Response:
    """Returns an answer as JSON; escaped, as names may hold what UTF-8 has no bytes for."""
    content = json.dumps(_finite(answer), ensure_ascii=True, allow_nan=False)
    return Response(content, status, media_type="application/json")


def _finite(value: Any) -> Any:
    """Returns NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file(package: str, name: str, media_type: str) -> Endpoint:
    """Makes the endpoint of one file of the page, which is read now."""
    content = importlib.resources.files(package).joinpath("templates", name).read_bytes()

    async def endpoint(request: Request) -> Response:
        del request
        return Response(content, media_type=media_type)

    return endpoint


async def _nothing_here(request: Request, error: Exception) -> Response:
    del request
    return _json(
        {"refused": "there is nothing at this address"}, getattr(error, "status_code", 404)
    )


class _Guard:
    """Answers only this page: no other page in the browser, and no other name of this machine.

    A page elsewhere can make its own host name point to this machine (DNS rebinding) and would then
    count as this page; it cannot do so with an address, such as 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...]):
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refused = self._refused(request)
        if refused:
            await _json({"refused": refused}, 403)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _refused(self, request: Request) -> str | None:
        """Returns why a request is not answered, or None."""
        host = request.headers.get("host", "")
        if not self._is_own(host):
            return "this host name is not that of the page; open it at the address it printed"
        if request.method == "GET" and request.url.path in _FILES:
            return None  # a link to the page
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "another page may not ask this one"
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "another page may not ask this one"
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

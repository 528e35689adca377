"""The web server of a live page: on this machine only, behind a token, with what has changed sent as server-sent events.

The page asks no other host for anything, and no other host can ask for it. The socket listens on the loopback address. A `Host`
header that names another host is refused, so that a foreign page cannot reach it by a name of its own (DNS rebinding). Every path
begins with a random token. Nothing can be changed through it.

A browser that comes back names the last revision that it has (`Last-Event-ID`), and gets what has changed after it.
"""

from __future__ import annotations

import asyncio
import secrets
import select
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedloom.core.errors import Refused
from fedloom.report.live.folder_feed import FolderFeed

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
"""Names by which a browser may ask; a tunnel from another machine uses them too."""
PORTS = range(8765, 8785)
"""The first free one of these is taken."""
POLL_SECONDS, BUSY_SECONDS = 0.2, 0.5
"""Seconds between two looks at the folder; after one that found something new a little longer, so that fast runs cost little."""
PING_SECONDS = 10.0
"""Seconds after which a line without content is sent, by which a connection that is gone is noticed."""
MOST_PAGES = 32
"""Browsers that may look at the same time."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageAddress:
    """Where a live page is served.

    Fields:
        socket: bound to a port of the loopback address.
        token: first part of every path.
    """

    socket: socket.socket
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    @property
    def url(self) -> str:
        """The address to open in a browser."""
        return f"http://{LOOPBACK}:{self.socket.getsockname()[1]}/{self.token}/"


def reserve_address(port: int | None = None) -> PageAddress:
    """Bind a port of the loopback address (None: the first free one of `PORTS`, or else any). Raises Refused if it is taken."""
    require_libraries()
    reason = ""
    for number in (*PORTS, 0) if port is None else (port,):
        bound = socket.socket()
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((LOOPBACK, number))
            bound.listen()
            return PageAddress(bound)
        except OSError as error:
            reason = error.strerror or str(error)
            bound.close()
    raise Refused("--port", port, f"it cannot be listened at ({reason}); choose another one, or leave the option out")


def serve_page(folder: Path, address: PageAddress, parent: IO[bytes] | None = None) -> None:
    """Serve the page about a folder until SIGINT or SIGTERM, or until `parent`, the other end of which is a process, says its end."""
    asyncio.run(_serve(FolderFeed(folder), address, parent))


@contextmanager
def page_process(folder: Path) -> Iterator[str]:
    """Serve the page about a folder from a process of its own during the block; yields its address.

    The folder need not exist yet. At the end of the block the page gets the last state, and the process ends. It ends too where this
    process is killed; Ctrl-C does not reach it. Raises Refused where it cannot start.
    """
    require_libraries()
    command = [sys.executable, "-P", "-m", __name__, str(folder)]  # -P: nothing is imported from the working directory
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            if not (url := process.stdout.readline().strip()):
                raise Refused("--watch", str(folder), "the process that serves the page did not start; see above")
            yield url
        finally:
            process.terminate()


def main() -> None:
    """Serve the page about the folder in the first argument, print its address, and end when the standard input does."""
    address = reserve_address()
    sys.stdout.write(f"{address.url}\n")
    sys.stdout.flush()
    serve_page(Path(sys.argv[1]), address, sys.stdin.buffer)


@dataclass(slots=True)
class LivePage:
    """A page that is served.

    Fields:
        feed: what it shows.
        changed: notified at each new revision.
        pages: browsers that are looking.
        over: whether the serving ends.
    """

    feed: FolderFeed
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    pages: int = 0
    over: bool = False

    async def follow(self, server: Any, parent: IO[bytes] | None) -> None:
        """Look at the folder until the server ends, or the process at the other end of `parent`; then once more."""
        try:
            while not server.should_exit:
                await asyncio.sleep(await self._read())
                if (
                    parent is not None and select.select([parent], [], [], 0)[0]
                ):  # nothing is written there: it has ended
                    break
            await self._read(last=True)
        finally:
            server.should_exit = self.over = True
            await self._notify()

    async def _read(self, last: bool = False) -> float:
        """Read all that is new; return after how many seconds to look again."""
        before = self.feed.revision
        while self.feed.refresh(last):
            await self._notify()
            await asyncio.sleep(0)  # browsers are answered meanwhile
        if self.feed.revision == before:
            return POLL_SECONDS
        await self._notify()
        return BUSY_SECONDS

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def messages(self, after: int) -> AsyncIterator[str]:
        """Yield what changes after a revision as server-sent events."""
        self.pages += 1
        try:
            yield "retry: 1000\n\n"
            while True:
                if self.feed.revision > after:
                    text, after = self.feed.message(after), self.feed.revision
                    yield f"id: {self.feed.name}-{after}\ndata: {text}\n\n"
                elif self.over:
                    yield "event: over\ndata: {}\n\n"
                    return
                elif not await self._wait(after):
                    yield ": ping\n\n"
        finally:
            self.pages -= 1

    async def _wait(self, after: int) -> bool:
        """Wait for a later revision or the end; return whether there was one in time."""
        try:
            async with self.changed:
                ready = self.changed.wait_for(lambda: self.over or self.feed.revision > after)
                return await asyncio.wait_for(ready, PING_SECONDS)
        except TimeoutError:
            return False

    def revision_in(self, text: str) -> int:
        """Return the revision that a browser has; 0 where it has none of this feed."""
        name, _, number = text.partition("-")
        whole = number.isascii() and number.isdecimal() and len(number) < 20
        return int(number) if name == self.feed.name and whole else 0


def page_app(page: LivePage, token: str) -> Starlette:
    """Return the web application: the page, its style and script, and its events."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    here, report = resources.files("fedloom.report.live"), resources.files("fedloom.report")
    style = "\n".join((place / "page.css").read_text(encoding="utf-8") for place in (report, here))
    files = {
        "": ("text/html", (here / "page.html").read_text(encoding="utf-8")),
        "page.css": ("text/css", style),
        "page.js": ("text/javascript", (here / "page.js").read_text(encoding="utf-8")),
    }

    def answer(request: Request) -> Response:
        if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
            return Response("no such page\n", 404, HEADERS, "text/plain")
        name = request.path_params["name"]
        if name == "events":
            if page.pages >= MOST_PAGES:
                return Response("too many pages are open\n", 503, HEADERS, "text/plain")
            after = page.revision_in(request.headers.get("last-event-id", ""))
            return StreamingResponse(page.messages(after), headers=HEADERS, media_type="text/event-stream")
        if name not in files:
            return Response("no such page\n", 404, HEADERS, "text/plain")
        kind, content = files[name]
        return Response(content, headers=HEADERS, media_type=kind)

    async def endpoint(request: Request) -> Response:
        return answer(request)

    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    app = Starlette(routes=[Route("/{token}/{name:path}", endpoint)], middleware=[trusted])
    app.router.redirect_slashes = False
    return app


async def _serve(feed: FolderFeed, address: PageAddress, parent: IO[bytes] | None) -> None:
    import uvicorn

    page = LivePage(feed)
    options = uvicorn.Config(
        page_app(page, address.token),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,  # a page gets the last state meanwhile
    )
    server = uvicorn.Server(options)
    following = asyncio.create_task(page.follow(server, parent))
    try:
        await server.serve([address.socket])
    finally:
        await following


def require_libraries() -> None:
    """Raise Refused where a library is missing that serves pages."""
    try:
        import starlette  # noqa: F401  # they are imported where they are used
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise Refused(
            "fedloom watch", error.name, "install what serves pages: pip install starlette uvicorn"
        ) from error


if __name__ == "__main__":
    main()

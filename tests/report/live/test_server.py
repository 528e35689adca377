"""Who may ask a live page for what: this machine, by its own name, with the token; and how its events are sent."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from fedloom.core.errors import Refused
from fedloom.report.live import server
from fedloom.report.live.folder_feed import FolderFeed
from fedloom.report.live.server import LivePage, page_app, reserve_address
from tests.support.fake_runs import write_run

TOKEN = "t0ken"


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Asks the application of an empty folder."""
    app = page_app(LivePage(FolderFeed(tmp_path)), TOKEN)

    async def request(path: str, method: str, host: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765") as client:
            return await client.request(method, path, headers={"host": host})

    def call(path: str, method: str = "GET", host: str = "127.0.0.1:8765") -> httpx.Response:
        return asyncio.run(request(path, method, host))

    return call


def test_the_page_and_its_files_are_served_with_strict_headers(ask: Ask) -> None:
    for name in ("", "page.css", "page.js"):
        answer = ask(f"/{TOKEN}/{name}")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/wrong/", "/t0ke/", "/t0kenn/events", f"/{TOKEN}/../secret", f"/{TOKEN}/page.py"]
)
def test_without_the_token_there_is_nothing(ask: Ask, path: str) -> None:
    assert ask(path).status_code == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "0.0.0.0:8765", ""])
def test_a_host_that_is_not_this_machine_is_refused(ask: Ask, host: str) -> None:
    """A foreign page that gives its own name the address 127.0.0.1 (DNS rebinding) sends its own name."""
    assert ask(f"/{TOKEN}/", host=host).status_code == 400


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:8765"])
def test_a_tunnel_may_use_another_port(ask: Ask, host: str) -> None:
    assert ask(f"/{TOKEN}/", host=host).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(ask: Ask, method: str) -> None:
    assert ask(f"/{TOKEN}/events", method).status_code == 405


def test_only_loopback_is_listened_at_and_a_taken_port_is_refused() -> None:
    first, second = reserve_address(), reserve_address()
    with first.socket, second.socket:
        assert first.socket.getsockname()[0] == "127.0.0.1"
        assert first.token != second.token
        assert len(first.token) >= 20
        with pytest.raises(Refused, match="--port"):
            reserve_address(first.socket.getsockname()[1])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(Refused, match="pip install starlette uvicorn"):
        reserve_address()


async def take(messages: AsyncIterator[str], count: int) -> list[str]:
    return [await anext(messages) for _ in range(count)]


def test_events_carry_their_revision_and_end_when_the_serving_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PING_SECONDS", 0.05)

    async def look() -> list[str]:
        page = LivePage(FolderFeed(write_run(tmp_path / "run")))
        await page._read()
        messages = page.messages(0)
        found = await take(messages, 3)
        assert page.pages == 1
        page.over = True
        found += [text async for text in messages]
        assert page.pages == 0
        return found

    first, content, ping, over = asyncio.run(look())
    assert first == "retry: 1000\n\n"
    assert content.startswith("id: ")
    assert content.endswith("\n\n")
    assert content.count("\n") == 3
    assert json.loads(content.split("data: ")[1])["full"]
    assert ping == ": ping\n\n"
    assert over.startswith("event: over\n")


def test_a_browser_that_comes_back_is_understood_by_its_last_event_only(tmp_path: Path) -> None:
    page = LivePage(FolderFeed(tmp_path))
    name = page.feed.name
    assert page.revision_in(f"{name}-17") == 17
    for other in (
        "",
        "17",
        f"{name}-",
        f"{name}--1",
        f"{name}-\u0661",
        f"{name}-{'9' * 5000}",
        f"0{name}-17",
        f"{name}-1 7",
    ):
        assert page.revision_in(other) == 0

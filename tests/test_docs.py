"""/docs in a real browser on the real service, also without internet access."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, expect, sync_playwright

from main import create_app
from tests.conftest import running, settings_for
from tests.postgres import free_port
from tests.service import printed_token, running_service

# Without DNS the browser reaches no other host, not even by its background requests.
BROWSER_OPTIONS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]


async def test_the_root_redirects_to_the_docs(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")

    assert answer.status_code == 307
    assert answer.headers["location"] == "/docs"


async def test_with_docs_off_their_paths_are_404(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, docs=False))) as client:
        for path in ("/", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"):
            answer = await client.get(path)
            assert answer.status_code == answer.json()["status"] == 404


async def test_the_docs_page_loads_nothing_from_another_host(client: httpx.AsyncClient) -> None:
    addresses = await addresses_in_docs(client)

    assert len(addresses) == 3
    assert [address for address in addresses if not address.startswith("/docs/assets/")] == []


async def test_every_asset_of_the_docs_page_is_served(client: httpx.AsyncClient) -> None:
    answers = [await client.get(address) for address in await addresses_in_docs(client)]

    served = {Path(answer.url.path).suffix: answer.headers["content-type"] for answer in answers}
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert served[".css"].startswith("text/css")
    assert re.match(r"(text|application)/javascript", served[".js"])  # Python 3.11 has the older media type
    assert served[".png"] == "image/png"
    assert all(answer.content for answer in answers)


@pytest.mark.process
def test_a_task_is_created_from_the_docs_without_internet(
    chromium: str, address: str, tmp_path: Path
) -> None:
    token = printed_token(tmp_path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        page = browser.new_page(service_workers="block")
        watched = Watched(page.context, address)

        page.goto(f"{address}/docs")
        authorize(page, token)
        kept = kept_by_the_browser(page)
        status, body = create_task(page, "alice", '{"title": "Buy milk"}')

        page.screenshot(path=tmp_path / "docs.png", full_page=True)
        browser.close()
    assert kept == [{}, {}]
    assert status == "201"
    assert json.loads(body)["title"] == "Buy milk"
    assert tasks_of("alice", address, token) == [json.loads(body)]
    assert f"{address}/openapi.json" in watched.requests
    assert watched.foreign_requests == []
    assert watched.errors == []


@pytest.mark.process
def test_a_user_signs_up_and_creates_a_task_from_the_docs(
    chromium: str, address: str, tmp_path: Path
) -> None:
    alice = {"name": "Alice", "email": "alice@example.com", "password": "correct horse battery"}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        page = browser.new_page(service_workers="block")
        watched = Watched(page.context, address)

        page.goto(f"{address}/docs")
        signed_up, account = sign_up(page, json.dumps(alice))
        authorize_by_password(page, alice["email"], alice["password"])
        kept = kept_by_the_browser(page)
        user_id, token = json.loads(account)["user"]["id"], json.loads(account)["token"]
        created, task = create_task(page, user_id, '{"title": "Buy milk"}')

        page.screenshot(path=tmp_path / "docs.png", full_page=True)
        browser.close()
    assert kept == [{}, {}]
    assert (signed_up, created) == ("200", "201")
    assert tasks_of(user_id, address, token) == [json.loads(task)]
    assert json.loads(task)["user_id"] == user_id
    assert f"{address}/api/auth/token" in watched.requests
    assert watched.foreign_requests == []
    assert watched.errors == []


class Watched:
    """Records a page's requests and errors; only requests to *address* succeed."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._address = address
        context.route(self._is_foreign, lambda route: route.abort())
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", self._listen)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))

    @property
    def foreign_requests(self) -> list[str]:
        return [url for url in self.requests if self._is_foreign(url)]

    def _is_foreign(self, url: str) -> bool:
        return not url.startswith((f"{self._address}/", "data:"))

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)


def authorize(page: Page, token: str) -> None:
    page.get_by_role("button", name="Authorize").click()
    dialog = page.locator(".dialog-ux")
    form = dialog.locator(".auth-container", has_text="bearer  (http, Bearer)")
    form.get_by_role("textbox").fill(token)
    form.get_by_role("button", name="Apply credentials").click()
    expect(form.get_by_role("button", name="Remove authorization")).to_be_visible()
    dialog.get_by_role("button", name="Close").first.click()


def sign_up(page: Page, body: str) -> tuple[str, str]:
    operation = page.locator("#operations-accounts-sign_up")
    operation.locator(".opblock-summary-control").click()
    operation.locator("textarea").fill(body)
    return execute(operation)


def authorize_by_password(page: Page, email: str, password: str) -> None:
    page.get_by_role("button", name="Authorize").click()
    dialog = page.locator(".dialog-ux")
    form = dialog.locator(".auth-container", has_text="password (OAuth2, password)")
    form.get_by_label("username:").fill(email)
    form.get_by_label("password:").fill(password)
    form.get_by_role("button", name="Apply given OAuth2 credentials").click()
    expect(form.get_by_role("button", name="Remove authorization")).to_be_visible()
    dialog.get_by_role("button", name="Close").first.click()


def kept_by_the_browser(page: Page) -> list[dict[str, str]]:
    """Return the browser storage that outlives the page and that any script of the origin can read."""
    kept: list[dict[str, str]] = page.evaluate("[{...localStorage}, {...sessionStorage}]")
    return kept


def create_task(page: Page, user_id: str, body: str) -> tuple[str, str]:
    operation = page.locator("#operations-tasks-create_task")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_placeholder("user_id").fill(user_id)
    operation.locator("textarea").fill(body)
    return execute(operation)


def execute(operation: Locator) -> tuple[str, str]:
    """Click Execute and return the status and the body that the page shows."""
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table .response")
    status = answer.locator(".response-col_status").inner_text()
    return status.strip(), answer.locator(".highlight-code code").inner_text()


def tasks_of(user_id: str, address: str, token: str) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {token}"}
    tasks: list[dict[str, Any]] = httpx.get(f"{address}/api/{user_id}/tasks", headers=headers).json()
    return tasks


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Start the service with only the port configured."""
    port = str(free_port())
    with running_service(tmp_path, PORT=port) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"


async def addresses_in_docs(client: httpx.AsyncClient) -> list[str]:
    answer = await client.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = LinkedPage()
    page.feed(answer.text)
    return page.addresses


class LinkedPage(HTMLParser):
    """Collects the URLs of a page's script and link tags."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link"):
            self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

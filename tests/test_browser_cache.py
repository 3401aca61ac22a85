import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from tests.postgres import free_port
from tests.service import printed_token, running_service
from tests.test_docs import BROWSER_OPTIONS

FETCH = """async ({url, token, method, body}) => {
    const headers = {Authorization: `Bearer ${token}`, "Content-Type": "application/json"};
    const answer = await fetch(url, {method, body, headers});
    return [answer.status, await answer.text()];
}"""


@pytest.mark.process
def test_a_browser_asks_whether_a_list_has_changed_and_keeps_it_for_its_user(
    chromium: str, tmp_path: Path
) -> None:
    port, front = free_port(), free_port()
    origin, tasks = f"http://127.0.0.1:{front}", f"http://127.0.0.1:{port}/api/alice/tasks"
    (tmp_path / "front").mkdir()
    alice, bob = printed_token(tmp_path), printed_token(tmp_path, "bob")
    settings = {"PORT": str(port), "ALLOWED_ORIGINS": origin, "LOG_FORMAT": "json"}
    with (
        running_service(tmp_path, **settings) as service,
        running_service(tmp_path / "front", PORT=str(front)) as page_server,  # any page of another origin
        sync_playwright() as playwright,
    ):
        service.wait_for(f"http://127.0.0.1:{port}")
        page_server.wait_for(origin)
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        page = browser.new_page(bypass_csp=True)  # our CSP forbids fetch(); a front end's own page would not
        page.goto(f"{origin}/health")

        def fetch(token: str, path: str = "", method: str = "GET", body: str | None = None) -> Any:
            request = {"url": f"{tasks}{path}", "token": token, "method": method}
            return page.evaluate(FETCH, request | ({"body": body} if body else {}))

        fetch(alice, method="POST", body='{"title": "Buy milk"}')
        first, same = fetch(alice), fetch(alice)
        foreign = fetch(bob)
        again = fetch(alice)
        one = [fetch(alice, "/1") for _ in range(2)]
        fetch(alice, "/1/complete", "PATCH")
        changed = fetch(alice)
        browser.close()
        lines = [json.loads(line) for line in service.logged.splitlines()]

    assert first == same == again  # the browser answers a 304 from its cache, as a 200
    assert first[0] == 200
    assert foreign[0] == 403
    assert "Buy milk" not in foreign[1]
    assert one[0] == one[1]
    assert json.loads(changed[1])[0]["completed"] is True
    reads = [line for line in lines if line.get("method") == "GET" and "/alice/" in line["path"]]
    sent = [(line["path"].removeprefix("/api/alice/tasks"), line["status"]) for line in reads]
    # The browser drops what it has kept at an address when another user asks there.
    assert sent == [("", 200), ("", 304), ("", 403), ("", 200), ("/1", 200), ("/1", 304), ("", 200)]

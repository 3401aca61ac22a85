"""/docs: Swagger UI from a package, so that it works without the internet."""

import base64
import hashlib
import re

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse, RedirectResponse

ASSETS = "/docs/assets"
# What the page itself needs; its one inline script is allowed by its hash.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self' '{script}'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def root() -> RedirectResponse:
    return RedirectResponse("/docs")


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon-32x32.png",
        # No persistAuthorization: it would keep the password in the browser's storage, in plain text.
        swagger_ui_parameters={"tryItOutEnabled": True},
    )
    page.headers["Content-Security-Policy"] = CONTENT_POLICY.format(script=_inline_script(bytes(page.body)))
    return page


def install(app: FastAPI) -> None:
    app.mount(ASSETS, StaticFiles(packages=[("fastapi_swagger", "resources")]), name="docs-assets")
    app.include_router(router)


def _inline_script(page: bytes) -> str:
    """Return the hash of the page's own script (CSP Level 3, section 2.3.1)."""
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}"

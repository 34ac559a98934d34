"""The web page's files in `serving/page`, read once when the server starts.

`/docs` redirects to the page's own view of the API: FastAPI's would load scripts from other hosts.
"""

import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

PAGE_DIR = Path(__file__).parents[1] / "page"
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""Media types of the served files by suffix; files with other suffixes are not served."""

HEADERS = {
    # Browsers ask each time and get 304 unless the file has changed.
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; font-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def page_routes(folder: Path = PAGE_DIR) -> list[BaseRoute]:
    """Return the routes `/`, `/page/NAME` and `/docs`, for GET and HEAD."""
    contents = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in MEDIA_TYPES}
    etags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in contents.items()}

    async def get_file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in contents:
            raise HTTPException(404, f"the page has no file {name[:80]!r}")
        headers = {**HEADERS, "etag": etags[name]}
        if request.headers.get("if-none-match") == etags[name]:
            return Response(status_code=304, headers=headers)
        media_type = MEDIA_TYPES[Path(name).suffix]
        return Response(contents[name], headers=headers, media_type=media_type)

    return [
        Route("/", get_file),
        Route("/page/{name}", get_file),
        Route("/docs", lambda _: RedirectResponse("./#docs")),
    ]

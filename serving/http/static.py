"""The page's files, from the folder `page`: read once, when the server starts; there are no others.

FastAPI's own documentation would have the browser ask other hosts: the page has a view of it.
"""

import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

FOLDER = Path(__file__).parents[1] / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""Of the files that are told, by how their names end."""

HEADERS = {
    # Asked for again each time, and sent again when it has changed.
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; font-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def is_page(path: str) -> bool:
    """Whether a path is that of the page or of its files, which hold no secret."""
    return path == "/" or path.startswith("/page/")


def page_routes(folder: Path = FOLDER) -> list[BaseRoute]:
    """`/`, `/page/NAME`, and `/docs`, which is a view of the page; for GET and HEAD."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.suffix in TYPES}
    contents = {name: file.read_bytes() for name, file in files.items()}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in contents.items()}

    async def send(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in contents:
            raise HTTPException(404, f"no file {name[:80]!r} of the page")
        headers = {**HEADERS, "etag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        kind = TYPES[files[name].suffix]
        return Response(contents[name], headers=headers, media_type=kind)

    async def docs(request: Request) -> Response:  # noqa: ARG001
        return RedirectResponse("./#docs")

    return [Route("/", send), Route("/page/{name}", send), Route("/docs", docs)]

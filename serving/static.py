"""The page's files, as they are in the folder `page`: read once, told apart from others only by their names."""

import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""What is told, by the ends of names."""

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
    """Whether a request's path is the page's, or one of its parts': they hold no secret."""
    return path == "/" or path.startswith("/page/")


def page_routes(folder: Path = FOLDER) -> list[BaseRoute]:
    """`/` and `/page/NAME`, for GET and HEAD."""
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

    return [Route("/", send), Route("/page/{name}", send)]

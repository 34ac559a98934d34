"""A local stand-in for the Hugging Face hub: serves FOLDER/owner/name as the dataset owner/name.

    python tests/hub.py FOLDER

prints its address, for HF_ENDPOINT. It implements only the requests with which `datasets` lists
and reads files, downloaded or streamed.
"""

import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two small writes: with the algorithm the second would wait for an ACK.
    disable_nagle_algorithm = True

    def __init__(self, folder: Path, *arguments) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"(/api)?/datasets/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(?:/(.*))?", path)
        if path == "/":
            return self.respond(b"hub")
        if not match or not (root := self.folder / match[2]).is_dir():
            return self.respond(b"", 404, {"X-Error-Code": "RepoNotFound"})
        api, name, verb, _, inner = match.groups()
        if api and verb in (None, "revision"):
            siblings = [{"rfilename": entry["path"]} for entry in listing(root, root.rglob("*"))]
            return self.respond({"id": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        target = root / (inner or "")
        if api and verb == "tree" and target.is_dir():
            return self.respond(listing(root, target.iterdir()))
        if verb == "resolve" and target.is_file():
            return self.send_file(target)
        return self.respond(b"", 404, {"X-Error-Code": "EntryNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Serve paths-info: the entries of the listing for the requested paths."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        root = self.folder / "/".join(self.path.split("/")[3:5])
        paths = [root / path for path in json.loads(body)["paths"]]
        self.respond(listing(root, filter(Path.exists, paths)))

    def send_file(self, path: Path) -> None:
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{sha(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(byte_range[1]), min(int(byte_range[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        self.respond(data, status, headers)

    def respond(self, body, status: int = 200, headers=()) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        if __name__ == "__main__":
            super().log_message(*arguments)


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def listing(root: Path, paths: Iterable[Path]) -> list[dict]:
    """The entries of files and folders in the hub's format."""
    return [
        {
            "type": "directory" if path.is_dir() else "file",
            "oid": sha(b"" if path.is_dir() else path.read_bytes()),
            "size": 0 if path.is_dir() else path.stat().st_size,
            "path": str(path.relative_to(root)),
        }
        for path in sorted(paths)
    ]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """Serve `folder` and yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, Path(sys.argv[1]))) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()

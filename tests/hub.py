"""A local stand-in for the Hugging Face hub: serves FOLDER/owner/name as the repository owner/name.

    python tests/hub.py FOLDER

prints its address, for HF_ENDPOINT. It implements only the requests with which `datasets` and
`huggingface_hub` list and read files, downloaded or streamed, and upload a folder by git LFS
(with HF_HUB_DISABLE_XET=1: the servers of Xet have no stand-in). A repository is a model or a dataset,
as one asks for it. FOLDER/owner/name@REVISION is another revision of it. A repository that holds a file
.private needs a token.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READ_TOKEN = "hf_owner", "hf_reader"
"""Tokens for everything, and for reading only."""
PRIVATE = ".private"
HTML = b"<!DOCTYPE html><title>Log in to this network</title>"


class Hub(ThreadingHTTPServer):
    """The stand-in for a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, str] = {}
        """Faults of repositories by name, or of everything by "*".

        silent: no answer; 500: only errors; for files also: cut: half of one, and the connection is closed;
        stalled: half of one; html: a page of the same size.
        """
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    # Headers and body are two small writes: with the algorithm the second would wait for an ACK.
    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = re.fullmatch(
            r"(/api)?(?:/models|/datasets)?/([\w.-]+/[\w.-]+?)(\.git)?(?:/([\w-]+)(?:/([^/]+))?(?:/(.*))?)?",
            path,
        )
        name = match[2] if match else ""
        self.fault = self.server.faults.get(name, self.server.faults.get("*"))
        if self.fault == "silent":
            return self.wait_for_client()
        if self.fault == "500":
            return self.respond(b"", 500)
        if path == "/":
            return self.respond(b"hub")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (TOKEN, READ_TOKEN):
            message = "Invalid credentials in Authorization header"
            return self.respond(b"", 401, {"X-Error-Message": message})
        if path == "/api/validate-yaml":
            header = yaml.safe_load(self.content()["content"].split("---")[1])
            errors = [] if isinstance(header, dict) else [{"message": "no metadata"}]
            return self.respond({"errors": errors, "warnings": []})
        if path.startswith("/lfs/"):  # an address that was given out, which needs no token
            self.server.uploads[path.removeprefix("/lfs/")] = self.body
            return self.respond(b"")
        is_upload = name == "repos/create" or (
            match and match[4] in ("preupload", "commit", "info")
        )
        if is_upload and token != TOKEN:
            status, message = (403, "you may only read") if token else (401, "log in first")
            return self.respond(b"", status, {"X-Error-Message": message})
        if name == "repos/create":
            return self.create()
        root = self.server.folder / name
        if not match or not root.is_dir() or ((root / PRIVATE).exists() and not token):
            status = 404 if token or not (root / PRIVATE).exists() else 401
            return self.respond(b"", status, {"X-Error-Code": "RepoNotFound"})
        api, _, _, verb, revision, inner = match.groups()
        if verb == "info":
            return self.answer_lfs_batch()
        revisions = [root, *root.parent.glob(f"{root.name}@*")]
        for candidate in revisions:
            named = (None, "main") if candidate == root else (candidate.name.partition("@")[2],)
            if revision in (*named, commit_of(candidate)):
                return self.answer(candidate, name, bool(api), verb, inner or "")
        return self.respond(b"", 404, {"X-Error-Code": "RevisionNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, root: Path, name: str, api: bool, verb: str | None, inner: str) -> None:
        """Answer a request about one revision of a repository."""
        target = root / inner
        if api and verb in (None, "revision"):
            siblings = [{"rfilename": entry["path"]} for entry in listing(root, root.rglob("*"))]
            about = {"id": name, "sha": commit_of(root), "siblings": siblings, "tags": []}
            return self.respond(about)
        if api and verb == "tree" and target.is_dir():
            is_recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
            return self.respond(
                listing(root, target.rglob("*") if is_recursive else target.iterdir())
            )
        if api and verb == "paths-info":
            paths = [root / path for path in json.loads(self.body)["paths"]]
            return self.respond(listing(root, filter(Path.exists, paths)))
        if api and verb == "preupload":
            return self.respond(
                {"files": [upload_mode(root, file) for file in self.content()["files"]]}
            )
        if api and verb == "commit":
            return self.commit(root, name)
        if verb == "resolve" and target.is_file():
            return self.send_file(root, target)
        headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(root)}
        return self.respond(b"", 404, headers)

    def content(self) -> dict:
        return json.loads(self.body)

    def create(self) -> None:
        content = self.content()
        name = f"{content['organization']}/{content['name']}"
        root = self.server.folder / name
        url = f"{self.server.address}/{name}"
        if root.exists():
            return self.respond({"error": "You already created this model repo", "url": url}, 409)
        root.mkdir(parents=True)
        if content.get("visibility") == "private":
            (root / PRIVATE).touch()
        return self.respond({"url": url})

    def answer_lfs_batch(self) -> None:
        """Say where the contents that are not here yet are to be put."""
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | (
                {}
                if each["oid"] in self.server.uploads
                else {"actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}}
            )
            for each in self.content()["objects"]
        ]
        self.respond({"transfer": "basic", "objects": objects})

    def commit(self, root: Path, name: str) -> None:
        for line in self.body.splitlines():
            value = json.loads(line)["value"]
            if "encoding" in value:
                data = base64.b64decode(value["content"])
            elif "oid" in value:
                data = self.server.uploads[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
            else:
                continue
            (root / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (root / value["path"]).write_bytes(data)
        oid = commit_of(root)
        self.respond({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid})

    def send_file(self, root: Path, path: Path) -> None:
        data, status = path.read_bytes(), 200
        headers = {
            "ETag": f'"{listing(root, [path])[0].get("lfs", {}).get("oid", git_hash(data))}"',
            "X-Repo-Commit": commit_of(root),
            "Accept-Ranges": "bytes",
        }
        half = len(data) // 2
        if self.fault == "html":
            data = HTML.ljust(len(data))[: len(data)]
        start = 0
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(byte_range[1]), min(int(byte_range[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if self.command == "GET" and self.fault in ("cut", "stalled"):
            self.respond(
                data[: max(0, half - start)], status, {**headers, "Content-Length": len(data)}
            )
            if self.fault == "stalled":
                self.wait_for_client()
            self.close_connection = True
        else:
            self.respond(data, status, headers)

    def wait_for_client(self) -> None:
        """Wait until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            self.rfile.read(1)
        self.close_connection = True

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


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    """Whether a file is stored by git LFS."""
    return path.endswith(".safetensors")


def upload_mode(root: Path, file: dict) -> dict:
    path = root / file["path"]
    oid = git_hash(path.read_bytes()) if path.is_file() else None
    if oid and is_large(file["path"]):
        oid = hashlib.sha256(path.read_bytes()).hexdigest()
    mode = "lfs" if is_large(file["path"]) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def listing(root: Path, paths: Iterable[Path]) -> list[dict]:
    """The entries of files and folders in the hub's format."""
    entries = []
    for path in sorted(paths):
        entry = {"type": "directory", "oid": git_hash(b""), "size": 0}
        if path.name == PRIVATE:
            continue
        if path.is_file():
            data = path.read_bytes()
            entry = {"type": "file", "oid": git_hash(data), "size": len(data)}
            if is_large(path.name):
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        entries.append({**entry, "path": path.relative_to(root).as_posix()})
    return entries


def commit_of(root: Path) -> str:
    """The hash of a revision: of all its files."""
    return hashlib.sha1(json.dumps(listing(root, root.rglob("*"))).encode()).hexdigest()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Hub]:
    """Serve `folder`."""
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


if __name__ == "__main__":
    with Hub(Path(sys.argv[1])) as server:
        print(server.address, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()

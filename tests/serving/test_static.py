"""The page's files over real sockets: their headers, who may get them, and that nothing else is served."""

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serving.http.runs import RunBrowser
from serving.http.static import MEDIA_TYPES, PAGE_DIR, page_routes
from tests.serving.running_server import RunningServer, connect, read_all

NAMES = sorted(file.name for file in PAGE_DIR.iterdir())


@pytest.fixture(scope="module")
def server(model):
    server = RunningServer(model, 1, key="sesame", runs=RunBrowser(PAGE_DIR.parents[1]))
    yield server
    server.close()


def test_page_files_are_public_and_have_security_headers(server):
    assert {"index.html", "app.js", "style.css"} <= {*NAMES}
    for name in ("", *(f"page/{name}" for name in NAMES)):
        response = server.http.get(f"/{name}")
        file = PAGE_DIR / (name.removeprefix("page/") or "index.html")
        assert (response.status_code, response.content) == (200, file.read_bytes())
        assert response.headers["content-type"].startswith(MEDIA_TYPES[file.suffix])
        policy = response.headers["content-security-policy"]
        assert policy == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; font-src 'none'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        head = server.http.head(f"/{name}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(file.stat().st_size)
        etag = {"if-none-match": response.headers["etag"]}
        again = server.http.get(f"/{name}", headers=etag)
        assert (again.status_code, again.content) == (304, b"")


def test_page_refers_to_its_own_origin_only():
    for name in NAMES:
        text = (PAGE_DIR / name).read_text("utf-8")
        if name.endswith(".html"):
            assert "page/app.js" in text
            assert 'src="/' not in text
            assert 'href="/' not in text
            assert "style=" not in text
            assert "<style" not in text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/runs"),
        ("GET", "/v1/runs/a"),
        ("GET", "/v1/ladder"),
        ("POST", "/v1/next"),
        ("POST", "/v1/xray"),
        ("POST", "/v1/completions"),
        ("GET", "/metrics"),
        ("GET", "/ready"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/page"),
        ("GET", "/nothing"),
    ],
)
def test_all_other_routes_need_the_api_key(server, method, path):
    response = server.http.request(method, path)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/health").status_code == 200
    headers = {"authorization": "Bearer sesame"}
    assert server.http.request(method, path, headers=headers).status_code != 401


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/nothing",
        "/page/..",
        "/page/../cli.py",
        "/page/../../README.md",
        "/page/%2e%2e/cli.py",
        "/page/%2e%2e%2fcli.py",
        "/page/..%5ccli.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/index.html/",
        "/page/index.html%00",
        "/page/%ff",
        "/page/" + "x" * 3000,
    ],
)
def test_no_path_leads_out_of_the_page(server, path):
    request = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    received = read_all(connect(server, request.encode()))
    assert received.startswith((b"HTTP/1.1 404", b"HTTP/1.1 307"))
    assert b"def " not in received
    assert b"root:" not in received


def test_only_files_of_known_types_are_served(tmp_path):
    (tmp_path / "index.html").write_text("x")
    (tmp_path / "app.js.map").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "folder").mkdir()
    client = TestClient(Starlette(routes=page_routes(tmp_path)))
    assert client.get("/page/index.html").text == "x"
    for name in ("app.js.map", ".hidden", "folder"):
        assert client.get(f"/page/{name}").status_code == 404

"""The page's files, over real sockets: what they may do, who may have them, and nothing but them."""

import pytest

from serving.http.runs import RunBrowser
from serving.http.static import FOLDER, TYPES, page_routes
from tests.serving.test_app import Running, model  # noqa: F401
from tests.serving.test_server import raw, whole

NAMES = sorted(file.name for file in FOLDER.iterdir())


@pytest.fixture(scope="module")
def locked(model):  # noqa: F811
    running = Running(model, 1, key="sesame", runs=RunBrowser(FOLDER.parents[1]))
    yield running
    running.close()


def test_the_page_and_its_parts_are_told_to_everybody(locked):
    assert {"index.html", "app.js", "style.css"} <= {*NAMES}
    for name in ("", *(f"page/{name}" for name in NAMES)):
        answer = locked.http.get(f"/{name}")
        file = FOLDER / (name.removeprefix("page/") or "index.html")
        assert (answer.status_code, answer.content) == (200, file.read_bytes())
        assert answer.headers["content-type"].startswith(TYPES[file.suffix])
        policy = answer.headers["content-security-policy"]
        assert policy == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; font-src 'none'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        head = locked.http.head(f"/{name}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(file.stat().st_size)
        known = {"if-none-match": answer.headers["etag"]}
        again = locked.http.get(f"/{name}", headers=known)
        assert (again.status_code, again.content) == (304, b"")


def test_the_page_is_text_of_its_own_origin_alone():
    for name in NAMES:
        text = (FOLDER / name).read_text("utf-8")
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
def test_all_else_asks_for_the_key(locked, method, path):
    answer = locked.http.request(method, path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert locked.http.get("/health").status_code == 200
    headers = {"authorization": "Bearer sesame"}
    assert locked.http.request(method, path, headers=headers).status_code != 401


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/nothing",
        "/page/..",
        "/page/../api.py",
        "/page/../../README.md",
        "/page/%2e%2e/api.py",
        "/page/%2e%2e%2fapi.py",
        "/page/..%5capi.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/index.html/",
        "/page/index.html%00",
        "/page/%ff",
        "/page/" + "x" * 3000,
    ],
)
def test_there_is_nothing_but_the_page(locked, path):
    request = f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    received = whole(raw(locked, request.encode()))
    assert received.startswith((b"HTTP/1.1 404", b"HTTP/1.1 307"))
    assert b"def " not in received
    assert b"root:" not in received


def test_only_files_of_the_page_s_kinds_are_told(tmp_path):
    (tmp_path / "index.html").write_text("x")
    (tmp_path / "app.js.map").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "folder").mkdir()
    assert [route.path for route in page_routes(tmp_path)] == [
        "/",
        "/page/{name}",
        "/docs",
    ]

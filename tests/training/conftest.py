import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of prepared tokens."""
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

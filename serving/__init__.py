"""Generate text from a run directory, in the terminal and over HTTP.

The path of a request: route -> async engine -> engine step -> model -> sampling -> detokenizer -> event.
docs/library.md shows how to use the package from Python.
"""

import importlib
import os
from typing import TYPE_CHECKING

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see training/__init__.py

if TYPE_CHECKING:
    from serving.cli import Serve
    from serving.http.app import create_app
    from serving.http.registry import ModelRegistry

__all__ = ["ModelRegistry", "Serve", "create_app"]

if not TYPE_CHECKING:
    # Imported at their first use: FastAPI takes longer to import than `sample` with a small model.
    _MODULES = {
        "ModelRegistry": "serving.http.registry",
        "Serve": "serving.cli",
        "create_app": "serving.http.app",
    }

    def __getattr__(name: str) -> object:
        """Import what `__all__` names."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)

"""Generate text from a run directory, in the terminal and over HTTP.

The path of a request: route -> async engine -> engine step -> model -> sampling -> detokenizer -> event.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see training/__init__.py

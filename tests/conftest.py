import os
from pathlib import Path

import pytest
from hypothesis import settings

# Tensors in the tests are tiny: a second thread would only wait for the first. Read when
# torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

SHARED = Path(os.environ.get("TINYGPT_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(items):
    """Start the files with long tests first, so that parallel processes end together."""
    long_files = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long_files)


@pytest.fixture
def real_data():
    """The folder of real corpora, which are too large to be part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the real corpora are not here: set TINYGPT_SHARED to the folder above data/")
    return SHARED / "data"

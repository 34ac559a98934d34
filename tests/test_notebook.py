"""docs/quickstart.ipynb runs from its first cell to its last, as on Colab but smaller."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]

SMALL = (
    "--data-limit 100000 --tokenizer bytes --steps 4 --batch-size 2 --context-length 64 --width 32 "
    "--depth 1 --heads 2 --eval-interval 2 --eval-tokens 256 --device cpu"
)
EXECUTE = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], 4)
resources = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
nbformat.write(notebook, sys.argv[2] + "/executed.ipynb")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of each code cell, by the cell's id."""
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install ipykernel")
    folder = tmp_path_factory.mktemp("notebook")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path,
        "TRAIN_OPTIONS": SMALL,
        "TINYGPT_CACHE": str(folder / "cache"),
        "TINYGPT_PORT": port,
        "TINYGPT_NO_COMPILE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
    }
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = json.loads((folder / "executed.ipynb").read_text("utf-8"))["cells"]
    return {cell["id"]: cell["outputs"] for cell in executed if cell["cell_type"] == "code"}


def printed(outputs, cell):
    """What a cell has written to standard output."""
    return "".join("".join(it["text"]) for it in outputs[cell] if it.get("name") == "stdout")


@pytest.mark.long
def test_every_cell_does_what_the_text_above_it_says(outputs):
    assert outputs["install"] == []
    assert "the whole validation split, with the best weights:" in printed(outputs, "train")
    (shown,) = outputs["show-plot"]
    assert base64.b64decode(shown["data"]["image/png"]).startswith(b"\x89PNG")
    assert printed(outputs, "sample").startswith("def ")
    assert "bits per byte" in printed(outputs, "sample")
    assert re.search("^import ", printed(outputs, "serve"), re.MULTILINE)
    assert printed(outputs, "transformers").startswith("def ")


def test_the_notebook_is_committed_without_outputs():
    codes = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert codes
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in codes)


def test_the_readme_and_the_notebook_lead_on():
    assert "(docs/quickstart.ipynb)" in (ROOT / "README.md").read_text("utf-8")
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    for name in ("training.md", "serving.md"):
        assert f"({name})" in text
        assert (NOTEBOOK.parent / name).is_file()

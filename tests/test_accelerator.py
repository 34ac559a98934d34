"""Everything that runs on an accelerator, on a fake one: `on_accelerator.py` in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("on_accelerator.py")


@pytest.mark.long
@pytest.mark.parametrize("like", ["cuda", "mps"])
def test_tests_pass_on_a_fake_accelerator(like, request):
    """In a process of its own: a fake accelerator changes torch for the whole process."""
    command = [sys.executable, "-m", "pytest", TESTS, "-p", "no:cacheprovider", "--tb=short"]
    environment = os.environ | {"FAKE_ACCELERATOR": like}
    process = subprocess.run(
        command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-10_000:] + process.stderr[-2_000:]

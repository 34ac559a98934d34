import os
import sys
import time
from pathlib import Path

import pytest
import torch

from serving.engine.autotune import run_in_own_thread


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_is_done_apart_leaves_no_workers_behind():
    def work():
        torch.set_num_threads(3)
        torch.ones(2**20).exp()
        return threads()

    torch.set_num_threads(3)  # torch has a pool of its own beside, which stays
    torch.set_num_threads(1)
    before = threads()
    assert run_in_own_thread(work) == before + 3
    end = time.monotonic() + 30
    while threads() > before:
        assert time.monotonic() < end
        os.sched_yield()
    with pytest.raises(ZeroDivisionError):
        run_in_own_thread(lambda: 1 // 0)

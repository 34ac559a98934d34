import os
import sys
import time
from pathlib import Path

import pytest
import torch

from serving.engine.autotune import run_in_own_thread


def count_threads():
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_openmp_workers_end_with_their_own_thread():
    def work():
        torch.set_num_threads(3)
        torch.ones(2**20).exp()
        return count_threads()

    torch.set_num_threads(3)  # starts torch's other pool, which stays
    torch.set_num_threads(1)
    before = count_threads()
    assert run_in_own_thread(work) == before + 3
    end = time.monotonic() + 30
    while count_threads() > before:
        assert time.monotonic() < end
        os.sched_yield()


def test_errors_in_own_thread_are_raised():
    with pytest.raises(ZeroDivisionError):
        run_in_own_thread(lambda: 1 // 0)

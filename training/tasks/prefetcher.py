"""Preparation of the next batch in a thread while the current one is trained on."""

from concurrent.futures import Future, ThreadPoolExecutor

from training.tasks.base import Batch, Task


class Prefetcher:
    """The batches of a task, one prepared ahead.

    Args:
        task: The task.
        steps: Number of batches; none is prepared beyond the last.
        enabled: Prepare batches in a thread; if False, each is made when it is requested.
    """

    def __init__(self, task: Task, steps: int, enabled: bool) -> None:
        self.task, self.steps = task, steps
        self.executor = ThreadPoolExecutor(1, "batches") if enabled else None
        self.pending: dict[int, Future[Batch]] = {}

    def batch(self, index: int) -> Batch:
        """Return the batch of step `index`, or raise the error of making it."""
        if self.executor is None:
            return self.task.batch(index)
        future = self.pending.pop(index, None) or self.executor.submit(self.task.batch, index)
        batch = future.result()
        if index + 1 < self.steps:
            self.pending = {index + 1: self.executor.submit(self.task.batch, index + 1)}
        return batch

    def close(self) -> None:
        """Stop the thread."""
        if self.executor:
            self.executor.shutdown(cancel_futures=True)

"""Training batches from a split's tokens: shuffled windows, or consecutive ones for stateful training."""

import functools
import mmap

import numpy as np
from numpy.typing import NDArray

from training.data.corpus import Tokens

Windows = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(tokens_BT, targets_BT): the targets are the tokens shifted by one."""


def _gather_windows(tokens: Tokens, starts_B: NDArray[np.int64], length: int) -> Windows:
    """Copy a window of `length` tokens from each start, without keeping pages of the file mapped.

    The operating system caches the pages that were read for as long as there is free memory.
    If they stayed in the memory map, they would count as memory of this process, in the end as
    much as the corpus is large.
    """
    windows = tokens[starts_B[:, None] + np.arange(length + 1)].astype(np.int64)
    if isinstance(tokens.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tokens.base.madvise(mmap.MADV_DONTNEED)
    return windows[:, :-1], windows[:, 1:]


class StatefulBatches:
    """Batches for stateful training: each row reads its own part of the text from start to end.

    Args:
        tokens: The text, which is divided into `batch_size` parts.
        context_length: Tokens of a row in one step.
        batch_size: Rows.
        seed: Unused: the order is that of the text.
    """

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int, seed: int) -> None:  # noqa: ARG002
        self.tokens, self.context_length = tokens, context_length
        part_length = (len(tokens) - 1) // batch_size
        if part_length < context_length:
            raise ValueError(
                f"the training split has {len(tokens):,} tokens, and {batch_size} rows of "
                f"{context_length:,} need {batch_size * context_length + 1:,}: give it more text, "
                "or a smaller --context-length or --batch-size"
            )
        self.starts_B = np.arange(batch_size) * part_length
        self.batches_per_epoch = part_length // context_length

    def batch(self, index: int) -> Windows:
        """Return (tokens_BT, targets_BT) of step `index`."""
        offset = index % self.batches_per_epoch * self.context_length
        return _gather_windows(self.tokens, self.starts_B + offset, self.context_length)


class ShuffledWindows:
    """Batches of windows in random order; each epoch has every window once.

    Each epoch shifts its grid of windows by another offset, so that their borders differ.
    A batch depends on the seed and its index only, so that resuming needs no other state.

    Args:
        tokens: The text, which is cut into windows.
        context_length: Tokens of a window.
        batch_size: Windows in a batch.
        seed: Seed of the order.
    """

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int, seed: int) -> None:
        if len(tokens) <= context_length:
            raise ValueError(
                f"the training split has {len(tokens):,} tokens, and one window of "
                f"{context_length:,} needs {context_length + 1:,}: give it more text, or a "
                "smaller --context-length"
            )
        self.tokens, self.context_length = tokens, context_length
        self.batch_size, self.seed = batch_size, seed
        # One window less than fits, so that the grid can be shifted by a whole window.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // context_length - 1)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffle_epoch)

    def _shuffle_epoch(self, epoch: int) -> tuple[int, NDArray[np.uint32]]:
        """Return the offset of an epoch's grid, and its windows in order of use."""
        random = np.random.default_rng([self.seed, epoch])
        max_offset = len(self.tokens) - 1 - self.windows_per_epoch * self.context_length
        offset = int(random.integers(max_offset, endpoint=True))
        # The only memory that grows with the corpus: 4 bytes per window.
        order = np.arange(self.windows_per_epoch, dtype=np.uint32)
        random.shuffle(order)
        return offset, order

    def _window_start(self, position: int) -> int:
        """Return the start of the window at a position in the order of all epochs."""
        epoch, epoch_position = divmod(position, self.windows_per_epoch)
        offset, order = self._epoch_order(epoch)
        return offset + self.context_length * int(order[epoch_position])

    def batch(self, index: int) -> Windows:
        """Return (tokens_BT, targets_BT) of step `index`."""
        positions = range(index * self.batch_size, (index + 1) * self.batch_size)
        starts_B = np.array([self._window_start(position) for position in positions])
        return _gather_windows(self.tokens, starts_B, self.context_length)

"""Word vectors: skip-gram (Mikolov et al. 2013).

    loss = -log sigmoid(v_c · u_o) - sum_n log sigmoid(-v_c · u_n)    with negative sampling
    loss = -log softmax(U v_c)_o                                      without: over all words

v_c is the vector of a center word c, u_o that of a context word at most `window` positions away,
and each u_n that of a negative, a randomly drawn word. A logistic regression tells context words
from negatives, and only its weights are kept: words with similar contexts get similar vectors.

A softmax table learns each pair of words separately. Here similar words share what is learned. The
softmax is a dot product with every word of the vocabulary; negative sampling replaces it by a few.
Limitations: a word has one vector for all sentences, the order of the context is lost, and no next
word is predicted.

Here N counts the negatives of a word, and W the words of a sequence.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import Model


class Word2Vec(Model):
    """Skip-gram, with negative sampling or a softmax over the vocabulary.

    Args:
        width: Width of a vector, D.
        window: Context words are at most this many positions from the center word.
        negatives: Randomly drawn words for each center word, N; 0: a softmax over all words.
    """

    chapter: ClassVar[int] = 7
    year: ClassVar[int] = 2013
    paper: ClassVar[str] = "Mikolov et al., Distributed representations of words and phrases"
    idea: ClassVar[str] = "a learned vector for each word"
    equation: ClassVar[str] = "p(context | center) = sigmoid(u·v)"
    supported_tasks: ClassVar[tuple[str, ...]] = ("word-vectors",)

    def __init__(
        self, vocab_size: int, *, width: int = 256, window: int = 5, negatives: int = 5
    ) -> None:
        super().__init__()
        if min(vocab_size, width, window) < 1 or negatives < 0:
            raise ValueError(
                f"vocab_size, width and window must be at least 1 and negatives at least 0, "
                f"not {vocab_size}, {width}, {window} and {negatives}"
            )
        self.vocab_size, self.window, self.negatives = vocab_size, window, negatives
        self.embedding = nn.Embedding(vocab_size, width)
        self.context_embedding = nn.Embedding(vocab_size, width)
        # As in the authors' program: small, so that every sigmoid is near a half, where it learns
        # fastest. One side may be zero, since its gradient is the other side.
        nn.init.uniform_(self.embedding.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.context_embedding.weight)
        self.counts_V: Tensor
        self.register_buffer("counts_V", torch.ones(vocab_size))

    @property
    def vectors_VD(self) -> Tensor:
        """The word vectors, to initialize `embedding.weight` of another model of the same width."""
        return self.embedding.weight.detach()

    def flops_per_token(self, length: int) -> float:  # noqa: ARG002 (does not depend on it)
        """Count the dot products of a center word, forward and backward.

        They are those with each context word and negative, or with every word.
        """
        products = 2 * self.window + self.negatives if self.negatives else self.vocab_size
        return 6.0 * products * self.embedding.embedding_dim

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the mean over the (center, context) pairs of tokens_BT + targets_BT[:, -1].

        A center word has the same negatives for all its context words. They are drawn in proportion
        to count^0.75, as in the paper, with the counts of the words trained on so far.
        """
        tokens_BT, targets_BT = batch
        words_BW = torch.cat([tokens_BT, targets_BT[:, -1:]], dim=1)
        if not self.negatives:
            return self.softmax_loss(words_BW)
        if self.training:
            ones = self.counts_V.new_ones(words_BW.numel())
            self.counts_V.index_add_(0, words_BW.flatten(), ones)
        negatives = torch.multinomial(
            self.counts_V**0.75, words_BW.numel() * self.negatives, replacement=True
        )
        centers_BWD = self.embedding(words_BW)
        contexts_BWD = self.context_embedding(words_BW)
        negatives_BWND = self.context_embedding(negatives.view(*words_BW.shape, self.negatives))
        scores_BWN = (negatives_BWND @ centers_BWD.unsqueeze(-1)).squeeze(-1)
        negative_log_p_BW = F.logsigmoid(-scores_BWN).sum(dim=-1)

        total, pairs = negative_log_p_BW.new_zeros(()), 0
        for center, context in self._pairs(words_BW.shape[1]):
            scores_BW = (centers_BWD[:, center] * contexts_BWD[:, context]).sum(dim=-1)
            total = total + (F.logsigmoid(scores_BW) + negative_log_p_BW[:, center]).sum()
            pairs += scores_BW.numel()
        return -total / pairs

    def softmax_loss(self, words_BW: Tensor) -> Tensor:
        """Return the mean over the same pairs, each center word compared with the whole vocabulary."""
        logits_BWV = self.embedding(words_BW) @ self.context_embedding.weight.t()
        log_p_BWV = F.log_softmax(logits_BWV, dim=-1)
        total, pairs = log_p_BWV.new_zeros(()), 0
        for center, context in self._pairs(words_BW.shape[1]):
            contexts_BW1 = words_BW[:, context, None]
            total = total + log_p_BWV[:, center].gather(-1, contexts_BW1).sum()
            pairs += contexts_BW1.numel()
        return -total / pairs

    def _pairs(self, length: int) -> Iterator[tuple[slice, slice]]:
        """Yield where the center and the context words of each distance and direction are."""
        for distance in range(1, min(self.window, length - 1) + 1):
            left, right = slice(0, length - distance), slice(distance, length)
            yield left, right
            yield right, left

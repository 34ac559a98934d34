"""Words become vectors: skip-gram with negative sampling (Mikolov et al. 2013).

    loss = -log sigmoid(v_c . u_o) - sum_n log sigmoid(-v_c . u_n)

v_c is the vector of a word c, u_o that of a word at most `span` places from it, and each u_n
that of a word drawn by chance. A logistic regression tells neighbours from chance, and its
weights are what is kept: words that have the same neighbours come to have the same vector.

What it mends: a softmax table knows each pair of words by itself, and must normalise over the
whole vocabulary; here what is learned of a word is shared with those like it, and a pair costs
a few dot products. What it leaves broken: a word has one vector whatever the sentence, and the
order of its neighbours is lost; and it predicts no next word.

N letters the negatives of a word and W the places of a text.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import Model


class Word2Vec(Model):
    """Skip-gram with negative sampling.

    Args:
        vocab_size: Number of token ids, V.
        width: Width of a vector, D.
        window: A word's neighbours are at most this many places away.
        negatives: Words drawn by chance against each neighbour, N.
    """

    chapter: ClassVar[int] = 7
    year: ClassVar[int] = 2013
    paper: ClassVar[str] = "Mikolov et al., Distributed representations of words and phrases"
    idea: ClassVar[str] = "words become vectors"
    supported_tasks: ClassVar[tuple[str, ...]] = ("word-vectors",)

    def __init__(
        self, vocab_size: int, *, width: int = 256, window: int = 5, negatives: int = 5
    ) -> None:
        super().__init__()
        if min(vocab_size, width, window, negatives) < 1:
            raise ValueError(
                f"vocabulary, width, span and negatives must be at least 1, not {vocab_size}, "
                f"{width}, {window} and {negatives}"
            )
        self.vocab_size, self.window, self.negatives = vocab_size, window, negatives
        self.embedding = nn.Embedding(vocab_size, width)
        self.neighbour = nn.Embedding(vocab_size, width)
        # Small, as in the authors' program: every sigmoid begins near a half, where it learns
        # fastest. One side may be zero, since its gradient is the other.
        nn.init.uniform_(self.embedding.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.neighbour.weight)
        self.counts_V: Tensor
        self.register_buffer("counts_V", torch.ones(vocab_size))

    @property
    def vectors_VD(self) -> Tensor:
        """What was learned: copy it into the `embedding.weight` of a model of the same width."""
        return self.embedding.weight.detach()

    def flops_per_token(self, length: int) -> float:  # noqa: ARG002 (the same for any length)
        """A dot product with each neighbour and each negative, forward and backward."""
        return 6.0 * (2 * self.window + self.negatives) * self.embedding.embedding_dim

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean over all pairs of neighbours in the texts of tokens_BT and, last, targets_BT[:, -1].

        A word's negatives serve against all its neighbours. They are drawn in proportion to
        count^0.75, as in the paper, of the words seen in training so far.
        """
        tokens_BT, targets_BT = batch
        text_BW = torch.cat([tokens_BT, targets_BT[:, -1:]], dim=1)
        if self.training:
            ones = self.counts_V.new_ones(text_BW.numel())
            self.counts_V.index_add_(0, text_BW.flatten(), ones)
        drawn = torch.multinomial(
            self.counts_V**0.75, text_BW.numel() * self.negatives, replacement=True
        )
        vectors_BWD = self.embedding(text_BW)
        neighbours_BWD = self.neighbour(text_BW)
        negatives_BWND = self.neighbour(drawn.view(*text_BW.shape, self.negatives))
        scores_BWN = (negatives_BWND @ vectors_BWD.unsqueeze(-1)).squeeze(-1)
        refused_BW = F.logsigmoid(-scores_BWN).sum(dim=-1)

        total, pairs = refused_BW.new_zeros(()), 0
        length = text_BW.shape[1]
        for distance in range(1, min(self.window, length - 1) + 1):
            early, late = slice(0, length - distance), slice(distance, length)
            for centre, other in ((early, late), (late, early)):
                scores_BW = (vectors_BWD[:, centre] * neighbours_BWD[:, other]).sum(dim=-1)
                total = total + (F.logsigmoid(scores_BW) + refused_BW[:, centre]).sum()
                pairs += scores_BW.numel()
        return -total / pairs

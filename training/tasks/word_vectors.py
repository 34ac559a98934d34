"""Word vectors: learn a vector for each token from the tokens near it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from gpt import Model
from gpt.models.word2vec import Word2Vec
from training.data.batches import ShuffledWindows
from training.data.corpus import Split
from training.evaluation.evaluate import inference_mode
from training.tasks.text import Text

SAMPLE_WORDS = 5
SAMPLE_NEIGHBORS = 6


@dataclass(frozen=True)
class WordVectorScore:
    """Mean cosine similarity of the vectors of adjacent tokens, and of random pairs of tokens."""

    loss: float
    adjacent_cosine: float
    random_cosine: float
    pairs: int

    def to_json(self) -> dict[str, float]:
        """Return all figures by name."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Return the figures as lines of text."""
        return (
            f"  loss             {self.loss:.4f} nats per pair\n"
            f"  mean cosine      {self.adjacent_cosine:.4f} of adjacent tokens\n"
            f"                   {self.random_cosine:.4f} of random tokens\n"
            f"  {self.pairs:,} pairs of each"
        )


class WordVectors(Text):
    """A vector for each token, trained to tell the tokens near it from random ones."""

    kind: ClassVar[str] = "word-vectors"
    eval_options: ClassVar[frozenset[str]] = frozenset()
    unsupported_options: ClassVar[frozenset[str]] = Text.unsupported_options | {
        "stateful",
        "init_embedding",
    }

    def validate(self, model: Model) -> float:
        """Return nats per pair over some of the validation split, with the same negatives each time."""
        return self._loss(model, self.corpus.splits["validation"], self.config.eval_tokens)

    def _loss(self, model: Model, split: Split, num_tokens: int) -> float:
        device = next(model.parameters()).device
        max_tokens = len(split.tokens) - 1
        context_length = self.config.context_length
        batch_size = max(1, min(num_tokens, max_tokens) // context_length)
        windows = ShuffledWindows(split.tokens, min(context_length, max_tokens), batch_size, 0)
        batch = (torch.from_numpy(array).to(device) for array in windows.batch(0))
        devices = [device] if device.type == "cuda" else []
        with (
            inference_mode(model, self.config.precision),
            torch.random.fork_rng(devices, device_type="cuda"),
        ):
            torch.manual_seed(0)
            return model.loss(*batch).item()

    def format_loss(self, loss: float) -> str:
        """Return the loss without a perplexity: no token is predicted."""
        return f"validation loss {loss:.4f}"

    def sample(self, model: Model, length: int) -> str:
        """Return some of the most frequent words, each with its nearest neighbors."""
        assert isinstance(model, Word2Vec)
        texts = [self.tokenizer.decode([i]).strip() for i in range(self.tokenizer.vocab_size)]
        is_word = np.array([len(text) > 2 and text.isalpha() for text in texts])
        tokens = self.corpus.splits["validation"].tokens
        counts = np.bincount(tokens, minlength=len(texts)) * is_word
        vectors_VD = F.normalize(model.vectors_VD.float().cpu(), dim=-1)
        lines = []
        for token in np.argsort(-counts, kind="stable")[: SAMPLE_WORDS * min(1, length)]:
            cosine_V = vectors_VD @ vectors_VD[token]
            cosine_V[torch.from_numpy(~is_word)] = -1
            # More than are shown: tokens that differ only in white space have the same text.
            nearest = [texts[i] for i in cosine_V.topk(2 * SAMPLE_NEIGHBORS).indices.tolist()]
            words = dict.fromkeys(word for word in nearest if word != texts[token])
            lines.append(f"{texts[token]}: {', '.join(list(words)[:SAMPLE_NEIGHBORS])}")
        return "\n".join(lines)

    def score(
        self,
        model: Model,
        split: str,
        *,
        final: bool = False,  # noqa: ARG002
        **options: Any,  # noqa: ANN401, ARG002
    ) -> WordVectorScore:
        """Return the loss over a split, and the mean cosine of adjacent and of random tokens."""
        assert isinstance(model, Word2Vec)
        data = self.corpus.splits[split]
        tokens = torch.from_numpy(data.tokens.astype(np.int64))
        vectors_VD = F.normalize(model.vectors_VD.float().cpu(), dim=-1)
        shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
        adjacent, random = (
            (vectors_VD[order[:-1]] * vectors_VD[order[1:]]).sum(-1).mean().item()
            for order in (tokens, shuffled)
        )
        return WordVectorScore(
            self._loss(model, data, len(tokens)), adjacent, random, len(tokens) - 1
        )

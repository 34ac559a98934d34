"""Tokens with similar vectors, in the embedding of any model that has one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import Model


def cosines(model: Model, token: int) -> Tensor:
    """Return cosine_V of a token's vector with that of every token.

    Raises:
        ValueError: The model has no embedding, or one without that token, or one that is not finite.
    """
    embedding = getattr(model, "embedding", None)
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no embedding, and so no vectors of words: "
            f"choose a run of word2vec or of another language model"
        )
    if token >= embedding.num_embeddings:
        raise ValueError(
            f"the embedding has {embedding.num_embeddings} tokens and none with the id {token}: "
            f"its model and the tokenizer are not of the same run"
        )
    vectors_VD = F.normalize(embedding.weight.detach().float(), dim=-1)
    cosine_V = vectors_VD @ vectors_VD[token]
    if not cosine_V.isfinite().all():
        raise ValueError("the embedding has values that are not finite: train the run again")
    return cosine_V


def nearest_tokens(model: Model, token: int, k: int) -> list[tuple[int, float]]:
    """Return the k tokens with the most similar vectors and their cosines, the most similar first.

    Raises:
        ValueError: The model has no embedding, or one that is not finite.
    """
    cosine_V = cosines(model, token)
    cosine_V[token] = -torch.inf
    nearest = cosine_V.topk(min(k, len(cosine_V) - 1))
    return list(zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True))

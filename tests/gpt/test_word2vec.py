"""Chapter 7: words with similar contexts get similar vectors."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt import GPT
from gpt.models.recurrent import LSTM
from gpt.models.word2vec import Word2Vec

GROUPS, SIZE = 6, 5
VOCABULARY = GROUPS * SIZE


def corpus(batch_size: int, length: int) -> Tensor:
    """tokens_BT: eight words of one group, then eight of another, and so on."""
    groups_BT = torch.randint(GROUPS, (batch_size, length // 8)).repeat_interleave(8, dim=1)
    return groups_BT * SIZE + torch.randint(SIZE, groups_BT.shape)


@pytest.fixture(scope="module")
def trained() -> Word2Vec:
    torch.manual_seed(0)
    model = Word2Vec(VOCABULARY, width=16, window=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        tokens_BT = corpus(16, 64)
        optimizer.zero_grad()
        model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        optimizer.step()
    return model


def test_chapter_7_context_words_have_more_similar_vectors_than_random_pairs(
    trained: Word2Vec,
) -> None:
    vectors_VD = F.normalize(trained.vectors_VD, dim=1)
    cosines_VV = vectors_VD @ vectors_VD.t()
    group_V = torch.arange(VOCABULARY) // SIZE
    same_VV = group_V.unsqueeze(1) == group_V
    different_VV = ~same_VV
    same_VV.fill_diagonal_(False)
    assert cosines_VV[same_VV].mean() > cosines_VV[different_VV].mean() + 0.4
    assert cosines_VV[same_VV].min() > cosines_VV[different_VV].max()


@pytest.mark.parametrize("model_class", [GPT, LSTM])
def test_chapter_7_vectors_load_as_the_embedding_of_another_model(trained, model_class) -> None:
    kwargs = {"heads": 1} if model_class is GPT else {}
    model = model_class(VOCABULARY, 8, width=16, depth=1, **kwargs)
    tokens_BT = torch.randint(VOCABULARY, (2, 8))
    before_BTD = model.features(tokens_BT)
    with torch.no_grad():
        model.embedding.weight.copy_(trained.vectors_VD)
    assert not trained.vectors_VD.requires_grad
    assert not torch.allclose(model.features(tokens_BT), before_BTD)
    assert torch.equal(model.embedding(tokens_BT), trained.vectors_VD[tokens_BT])


def test_loss_equals_the_papers_formula_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Word2Vec(12, width=6, window=2, negatives=3).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    words_BW = torch.randint(12, (2, 5))
    negatives_BWN = torch.randint(12, (2, 5, 3))
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: negatives_BWN.flatten())
    v, u = model.embedding.weight, model.context_embedding.weight
    pairs = []
    for words, negatives in zip(words_BW, negatives_BWN, strict=True):
        for center in range(5):
            for context in range(5):
                if 0 < abs(center - context) <= 2:
                    vector = v[words[center]]
                    loss = -F.logsigmoid(vector @ u[words[context]])
                    loss -= sum(F.logsigmoid(-vector @ u[n]) for n in negatives[center])
                    pairs.append(loss)
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(model.loss(words_BW[:, :-1], words_BW[:, 1:]), expected)


def test_negatives_are_drawn_by_the_counts_of_trained_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Word2Vec(4, width=2)
    multinomial = Mock(wraps=torch.multinomial)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    tokens_BT = torch.tensor([[0, 0, 1], [0, 2, 2]])
    model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    model.eval().loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    assert model.counts_V.tolist() == [4, 2, 3, 1]  # counts start at 1: any word can be drawn
    for call in multinomial.call_args_list:
        torch.testing.assert_close(call.args[0], torch.tensor([4.0, 2.0, 3.0, 1.0]) ** 0.75)
    assert "counts_V" in model.state_dict()  # a resumed run draws the same negatives


def test_loss_is_reproducible_and_sequences_may_be_shorter_than_the_window() -> None:
    model = Word2Vec(9, width=4, window=50).eval()
    tokens_BT = torch.tensor([[1, 2]])
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(model.loss(tokens_BT[:, :1], tokens_BT[:, 1:]))
    assert losses[0] == losses[1]
    # Before training each of the six sigmoids is a half.
    torch.testing.assert_close(losses[0], -6 * torch.tensor(0.5).log())


def test_flops_count_the_dot_products() -> None:
    assert Word2Vec(9, width=4, window=2, negatives=3).flops_per_token(10) == 6 * 7 * 4


@pytest.mark.parametrize("kwargs", [{"width": 0}, {"window": 0}, {"negatives": -1}])
def test_invalid_arguments_raise(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Word2Vec(9, **kwargs)


def test_without_negatives_the_loss_is_a_softmax_over_all_words() -> None:
    torch.manual_seed(0)
    model = Word2Vec(12, width=6, window=2, negatives=0).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    words_BW = torch.randint(12, (2, 5))
    v, u = model.embedding.weight, model.context_embedding.weight
    pairs = [
        F.cross_entropy(u @ v[words[center]], words[context])
        for words in words_BW
        for center in range(5)
        for context in range(5)
        if 0 < abs(center - context) <= 2
    ]
    loss = model.loss(words_BW[:, :-1], words_BW[:, 1:])
    torch.testing.assert_close(loss, torch.stack(pairs).mean())


def test_a_softmax_takes_a_product_with_every_word_and_sampling_with_fifteen() -> None:
    sampled, softmax = (Word2Vec(10_000, width=4, window=5, negatives=n) for n in (5, 0))
    assert sampled.flops_per_token(8) == 6 * 15 * 4
    assert softmax.flops_per_token(8) == 6 * 10_000 * 4

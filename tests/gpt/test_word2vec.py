"""Chapter 7: words with the same neighbours come to have the same vector."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt import GPT
from gpt.models.recurrent import LSTM
from gpt.models.word2vec import Word2Vec

GROUPS, SIZE = 6, 5
VOCABULARY = GROUPS * SIZE


def corpus(rows: int, length: int) -> Tensor:
    """tokens_BT: eight words of one group, then eight of another, and so on."""
    groups_BT = torch.randint(GROUPS, (rows, length // 8)).repeat_interleave(8, dim=1)
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


def test_chapter_7_neighbours_end_nearer_than_random_pairs(trained: Word2Vec) -> None:
    vectors_VD = F.normalize(trained.vectors_VD, dim=1)
    cosines_VV = vectors_VD @ vectors_VD.t()
    group_V = torch.arange(VOCABULARY) // SIZE
    same_VV = group_V.unsqueeze(1) == group_V
    apart_VV = ~same_VV
    same_VV.fill_diagonal_(False)
    assert cosines_VV[same_VV].mean() > cosines_VV[apart_VV].mean() + 0.4
    assert cosines_VV[same_VV].min() > cosines_VV[apart_VV].max()


@pytest.mark.parametrize("model_class", [GPT, LSTM])
def test_chapter_7_vectors_load_as_another_rungs_embedding(trained, model_class) -> None:
    own = {"heads": 1} if model_class is GPT else {}
    model = model_class(VOCABULARY, 8, width=16, depth=1, **own)
    tokens_BT = torch.randint(VOCABULARY, (2, 8))
    before_BTD = model.features(tokens_BT)
    with torch.no_grad():
        model.embedding.weight.copy_(trained.vectors_VD)
    assert not trained.vectors_VD.requires_grad
    assert not torch.allclose(model.features(tokens_BT), before_BTD)
    assert torch.equal(model.embedding(tokens_BT), trained.vectors_VD[tokens_BT])


def test_the_loss_is_the_papers_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Word2Vec(12, width=6, window=2, negatives=3).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    text_BW = torch.randint(12, (2, 5))
    drawn = torch.randint(12, (2, 5, 3))
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: drawn.flatten())
    v, u = model.embedding.weight, model.neighbour.weight
    pairs = []
    for row in range(2):
        for centre in range(5):
            for other in range(5):
                if 0 < abs(centre - other) <= 2:
                    word = v[text_BW[row, centre]]
                    loss = -F.logsigmoid(word @ u[text_BW[row, other]])
                    loss -= sum(F.logsigmoid(-word @ u[n]) for n in drawn[row, centre])
                    pairs.append(loss)
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(model.loss(text_BW[:, :-1], text_BW[:, 1:]), expected)


def test_negatives_follow_the_counts_seen_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Word2Vec(4, width=2)
    seen = []
    draw = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *rest, **more: seen.append(p) or draw(p, *rest, **more)
    )
    tokens_BT = torch.tensor([[0, 0, 1], [0, 2, 2]])
    model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    model.eval().loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    assert model.counts_V.tolist() == [4, 2, 3, 1]  # once more than seen: any word can be drawn
    for weights_V in seen:
        torch.testing.assert_close(weights_V, torch.tensor([4.0, 2.0, 3.0, 1.0]) ** 0.75)
    assert "counts_V" in model.state_dict()  # so that a resumed run draws as the first would have


def test_a_seed_gives_the_same_loss_and_a_text_may_be_shorter_than_the_span() -> None:
    model = Word2Vec(9, width=4, window=50).eval()
    tokens_BT = torch.tensor([[1, 2]])
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(model.loss(tokens_BT[:, :1], tokens_BT[:, 1:]))
    assert losses[0] == losses[1]
    # Nothing learned: every one of six sigmoids is a half.
    torch.testing.assert_close(losses[0], -6 * torch.tensor(0.5).log())


def test_flops_count_the_dot_products() -> None:
    assert Word2Vec(9, width=4, window=2, negatives=3).flops_per_token(10) == 6 * 7 * 4


@pytest.mark.parametrize("own", [{"width": 0}, {"window": 0}, {"negatives": 0}])
def test_bad_arguments_are_refused(own: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Word2Vec(9, **own)

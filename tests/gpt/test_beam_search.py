"""What every model that translates must hold, and the search for the best target."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from gpt.beam_search import translate
from gpt.models.base import EncoderDecoder, LanguageModel, State, batch_slice
from gpt.models.gpt import GPT, GPT2
from gpt.models.seq2seq import Seq2Seq, Seq2SeqAttention
from gpt.models.transformer import Transformer

VOCABULARY, CONTEXT = 23, 16

MODELS = {
    "seq2seq": lambda v, c: Seq2Seq(v, c, width=16, depth=2),
    "reversed": lambda v, c: Seq2Seq(v, c, width=16, depth=1, reverse=True),
    "attention": lambda v, c: Seq2SeqAttention(v, c, width=16),
    "transformer": lambda v, c: Transformer(v, c, width=16, depth=2, heads=2),
    "gpt2": lambda v, c: GPT2(v, c, width=16, depth=2, heads=2),
    "gpt": lambda v, c: GPT(v, c, width=16, depth=2, heads=2),
}


def build(name: str, vocabulary: int = VOCABULARY) -> LanguageModel:
    """In float64, with weights such that every part of the model matters."""
    torch.manual_seed(0)
    model = MODELS[name](vocabulary, CONTEXT).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """source_BS, lengths_B, tokens_BT, targets_BT."""
    generator = torch.Generator().manual_seed(1)
    source_BS = torch.randint(VOCABULARY, (4, 9), generator=generator)
    whole_BT = torch.randint(VOCABULARY, (4, 8), generator=generator)
    targets_BT = whole_BT[:, 1:].clone()
    targets_BT[1, 3:] = targets_BT[2, 5:] = -100
    return source_BS, torch.tensor([9, 1, 4, 7]), whole_BT[:, :-1], targets_BT


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 4]], ids=str)
def test_what_is_trained_is_what_is_written(model, pairs, chunks: list[int]) -> None:
    source_BS, lengths_B, tokens_BT, _ = pairs
    state = model.start(source_BS, lengths_B)
    parts = [model.features(chunk_BT, state) for chunk_BT in tokens_BT.split(chunks, dim=1)]
    same(torch.cat(parts, dim=1), model.predictions(*pairs)[0])


def test_what_stands_after_a_sentence_does_not_matter(model, pairs) -> None:
    source_BS, lengths_B, _, targets_BT = pairs
    padding_BS = torch.arange(9) >= lengths_B.unsqueeze(1)
    changed_BS = torch.where(padding_BS, (source_BS + 1) % VOCABULARY, source_BS)
    same(model.nll(changed_BS, *pairs[1:]), model.nll(*pairs))
    for row, length in enumerate(lengths_B.tolist()):
        alone = [tensor[row : row + 1] for tensor in pairs]
        alone[0] = alone[0][:, :length]
        same(model.nll(*alone), model.nll(*pairs)[row : row + 1])
    last_B = source_BS[torch.arange(4), lengths_B - 1]
    other_BS = source_BS.scatter(1, lengths_B.unsqueeze(1) - 1, (last_B.unsqueeze(1) + 1) % 23)
    other = model.nll(other_BS, *pairs[1:])
    assert ((other - model.nll(*pairs)).abs() > 1e-6)[targets_BT != -100].all()


def test_the_loss_of_pairs_is_the_mean_over_their_targets(model, pairs) -> None:
    counted = pairs[3] != -100
    nll_BT = model.nll(*pairs)
    assert (nll_BT[~counted] == 0).all()
    same(model.loss(*pairs), nll_BT[counted].mean())


def test_every_weight_learns_from_pairs_and_from_text(model, pairs) -> None:
    for batch in (pairs, pairs[2:]):
        model.zero_grad()
        model.train().loss(*batch).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            # Softmax does not see what it adds to every score.
            if "key.bias" not in name:
                assert parameter.grad.abs().max() > 1e-9, name


def test_a_prompt_is_read_then_continued(model) -> None:
    """In rows of a larger state, one by one, then together: as the server does it."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCABULARY, (1, length), generator=generator) for length in (5, 1, 8)]
    state = model.init_state(4, CONTEXT)
    features_BD = torch.cat(
        [model.read(prompt, batch_slice(state, i, i + 1)) for i, prompt in enumerate(prompts)]
    )
    texts = [prompt[0].tolist() for prompt in prompts]
    for _ in range(5):
        next_B = model.logits(features_BD).argmax(dim=-1)
        for text, token in zip(texts, next_B.tolist(), strict=True):
            text.append(token)
        features_BD = model.features(next_B.unsqueeze(1), batch_slice(state, 0, 3))[:, 0]
    for prompt, text in zip(prompts, texts, strict=True):
        length = prompt.shape[1]
        for end in range(length, length + 5):
            so_far = torch.tensor([text[:end]])
            if isinstance(model, EncoderDecoder):
                read = model.encode_source(prompt, torch.tensor([length]))
                logits_BTV = model.logits(model.features(so_far[:, length - 1 :], read))
            else:
                logits_BTV = model(so_far)
            assert logits_BTV[0, -1].argmax() == text[end]


def test_text_is_scored_from_what_is_before_it_and_from_all_of_that(model) -> None:
    """Each of the `scorable` targets sees every token before it, and none sees one after it."""
    tokens_BT = torch.randint(VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(3))
    targets_BT = torch.randint(VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(4))
    before = model.nll(tokens_BT, targets_BT)
    written = 5 if isinstance(model, EncoderDecoder) else 11
    same(model.loss(tokens_BT, targets_BT), before[:, -written:].mean())
    for place in range(11):
        changed_BT = tokens_BT.clone()
        changed_BT[0, place] = (changed_BT[0, place] + 1) % VOCABULARY
        moved = (model.nll(changed_BT, targets_BT) - before)[0].abs() > 1e-9
        assert not moved[:place].any()
        assert moved[max(place, 11 - written) :].all()


def test_a_window_of_one_token_can_be_scored(model) -> None:
    token = torch.tensor([[3]])
    assert model.nll(token, token).shape == (1, 1)
    same(model.loss(token, token), model.nll(token, token).mean())


def test_targets_that_do_not_count_change_nothing_else(model) -> None:
    tokens_BT, targets_BT = torch.randint(
        VOCABULARY, (2, 3, 12), generator=torch.Generator().manual_seed(5)
    )
    late_BT = targets_BT.clone()
    late_BT[:, : 12 - model.scorable] = -100
    whole, late = model.nll(tokens_BT, targets_BT), model.nll(tokens_BT, late_BT)
    same(late, whole.where(late_BT != -100, 0.0))


@pytest.mark.parametrize("name", ["seq2seq", "attention", "transformer"])
def test_training_meets_short_prompts_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name).train()
    seen = []

    def encode(source_BS: Tensor, lengths_B: Tensor) -> State:
        seen.extend(
            row[:length].tolist() for row, length in zip(source_BS, lengths_B.tolist(), strict=True)
        )
        return type(model).encode(model, source_BS, lengths_B)

    monkeypatch.setattr(model, "encode", encode)
    tokens_BT = torch.arange(CONTEXT).expand(200, -1)
    model.loss(tokens_BT, tokens_BT)
    half = list(range(CONTEXT // 2 + 1))
    assert {tuple(source) for source in seen} == {tuple(half[cut:]) for cut in range(len(half))}
    assert 80 < sum(source == half for source in seen) < 140


def test_a_model_that_cannot_translate_says_so(pairs) -> None:
    class Silent(LanguageModel):
        pass

    model = Silent(5, 4)
    for ask in (lambda: model.encode_source(*pairs[:2]), lambda: model.loss(*pairs)):
        with pytest.raises(ValueError, match="Silent does not translate"):
            ask()


BEGIN, END = 0, 1


def greedy(model: LanguageModel, source: list[int], most: int, end: int) -> list[int]:
    """From the source again for every token."""
    target = [BEGIN]
    while len(target) <= most:
        state = model.encode_source(torch.tensor([source]), torch.tensor([len(source)]))
        logits_BTV = model.logits(model.features(torch.tensor([target]), state))
        token = int(logits_BTV[0, -1].argmax())
        if token == end:
            break
        target.append(token)
    return target[1:]


def score(model: LanguageModel, source: list[int], target: list[int], penalty: float) -> float:
    """Of a target with the end that it may have."""
    nll_BT = model.nll(
        torch.tensor([source]),
        torch.tensor([len(source)]),
        torch.tensor([[BEGIN, *target[:-1]]]),
        torch.tensor([target]),
    )
    return -nll_BT.sum().item() / len(target) ** penalty


def sources(vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(6)
    return [
        torch.randint(vocabulary, (length,), generator=generator).tolist()
        for length in (4, 1, 7, 5, 9, 2, 3, 6)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_one_beam_is_greedy_for_many_sentences_at_once(name: str) -> None:
    model = build(name, vocabulary=5)
    lengths = set()
    for end in range(5):
        got = translate(model, sources(5), decoder_start_token=BEGIN, eos_token=end, max_tokens=7)
        assert got == [greedy(model, source, 7, end) for source in sources(5)]
        lengths |= {len(target) for target in got}
    assert len(lengths) > 1  # they do end at different times


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["attention", "transformer", "gpt"])
def test_many_beams_find_what_trying_all_targets_finds(name: str, penalty: float) -> None:
    model = build(name, vocabulary=4)
    words = [token for token in range(4) if token != END]
    every = [
        [*target, *ending]
        for length in range(4)
        for target in itertools.product(words, repeat=length)
        for ending in ([[END]] if length < 3 else [[]])
    ]
    every = [target for target in every if target]
    got = translate(
        model,
        sources(4),
        decoder_start_token=BEGIN,
        eos_token=END,
        max_tokens=3,
        num_beams=64,
        length_penalty=penalty,
    )
    for source, target in zip(sources(4), got, strict=True):
        best = max(every, key=lambda target: score(model, source, target, penalty))
        assert target == [token for token in best if token != END]


def test_more_beams_find_no_worse_targets_and_rows_are_independent(model) -> None:
    together = translate(
        model, sources(), decoder_start_token=BEGIN, eos_token=END, max_tokens=6, num_beams=4
    )
    for source, target in zip(sources(), together, strict=True):
        assert [target] == translate(
            model, [source], decoder_start_token=BEGIN, eos_token=END, max_tokens=6, num_beams=4
        )

    def total(targets: list[list[int]]) -> float:
        ended = [[*target, END][:6] for target in targets]
        return sum(map(lambda s, t: score(model, s, t, 1.0), sources(), ended))

    assert total(together) >= total(
        translate(model, sources(), decoder_start_token=BEGIN, eos_token=END, max_tokens=6)
    )


def test_a_target_ends_where_the_model_has_no_more_room() -> None:
    for name, room in (("transformer", CONTEXT), ("gpt", CONTEXT - 9), ("seq2seq", 40)):
        model = build(name)
        source = sources()[4]
        [target] = translate(
            model, [source], decoder_start_token=BEGIN, eos_token=VOCABULARY, max_tokens=40
        )
        assert len(target) == room
    with pytest.raises(ValueError, match=r"16 tokens long.*no room"):
        translate(build("gpt"), [[2] * 16], decoder_start_token=BEGIN, eos_token=END, max_tokens=5)


def test_mistakes_are_said() -> None:
    model = build("seq2seq")
    assert translate(model, [], decoder_start_token=BEGIN, eos_token=END, max_tokens=5) == []
    with pytest.raises(ValueError, match="source sentence is empty"):
        translate(model, [[1], []], decoder_start_token=BEGIN, eos_token=END, max_tokens=5)
    with pytest.raises(ValueError, match=r"beams and most must be at least 1.*0, 5"):
        translate(model, [[1]], decoder_start_token=BEGIN, eos_token=END, max_tokens=5, num_beams=0)

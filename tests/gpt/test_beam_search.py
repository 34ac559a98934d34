"""Models that translate: their common contract, and beam search."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from gpt.beam_search import translate
from gpt.models.base import LanguageModel, State, batch_slice
from gpt.models.encoder_decoder import EncoderDecoder
from gpt.models.gpt import GPT, GPT2
from gpt.models.seq2seq import Seq2Seq, Seq2SeqAttention
from gpt.models.transformer import Transformer

VOCAB_SIZE, CONTEXT_LENGTH = 23, 16

MODELS = {
    "seq2seq": lambda v, c: Seq2Seq(v, c, width=16, depth=2),
    "reversed": lambda v, c: Seq2Seq(v, c, width=16, depth=1, reverse=True),
    "attention": lambda v, c: Seq2SeqAttention(v, c, width=16),
    "transformer": lambda v, c: Transformer(v, c, width=16, depth=2, heads=2),
    "gpt2": lambda v, c: GPT2(v, c, width=16, depth=2, heads=2),
    "gpt": lambda v, c: GPT(v, c, width=16, depth=2, heads=2),
}


def build(name: str, vocab_size: int = VOCAB_SIZE) -> LanguageModel:
    """Return a model in float64 with random weights, so that every part of it matters."""
    torch.manual_seed(0)
    model = MODELS[name](vocab_size, CONTEXT_LENGTH).double().eval()
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
    source_BS = torch.randint(VOCAB_SIZE, (4, 9), generator=generator)
    sequence_BT = torch.randint(VOCAB_SIZE, (4, 8), generator=generator)
    targets_BT = sequence_BT[:, 1:].clone()
    targets_BT[1, 3:] = targets_BT[2, 5:] = -100
    return source_BS, torch.tensor([9, 1, 4, 7]), sequence_BT[:, :-1], targets_BT


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 4]], ids=str)
def test_training_and_decoding_give_the_same_features(model, pairs, chunks: list[int]) -> None:
    source_BS, lengths_B, tokens_BT, _ = pairs
    state = model.encode_source(source_BS, lengths_B)
    features = [model.features(chunk_BT, state) for chunk_BT in tokens_BT.split(chunks, dim=1)]
    assert_equal(torch.cat(features, dim=1), model.features_and_targets(*pairs)[0])


def test_padding_does_not_matter(model, pairs) -> None:
    source_BS, lengths_B, _, targets_BT = pairs
    padding_BS = torch.arange(9) >= lengths_B.unsqueeze(1)
    changed_BS = torch.where(padding_BS, (source_BS + 1) % VOCAB_SIZE, source_BS)
    assert_equal(model.nll(changed_BS, *pairs[1:]), model.nll(*pairs))
    for row, length in enumerate(lengths_B.tolist()):
        single = [tensor[row : row + 1] for tensor in pairs]
        single[0] = single[0][:, :length]
        assert_equal(model.nll(*single), model.nll(*pairs)[row : row + 1])
    last_B = source_BS[torch.arange(4), lengths_B - 1]
    other_BS = source_BS.scatter(1, lengths_B.unsqueeze(1) - 1, (last_B.unsqueeze(1) + 1) % 23)
    difference_BT = model.nll(other_BS, *pairs[1:]) - model.nll(*pairs)
    assert (difference_BT.abs() > 1e-6)[targets_BT != -100].all()


def test_the_loss_of_pairs_is_the_mean_over_their_targets(model, pairs) -> None:
    counted = pairs[3] != -100
    nll_BT = model.nll(*pairs)
    assert (nll_BT[~counted] == 0).all()
    assert_equal(model.loss(*pairs), nll_BT[counted].mean())


def test_every_weight_gets_a_gradient_from_pairs_and_from_text(model, pairs) -> None:
    for batch in (pairs, pairs[2:]):
        model.zero_grad()
        model.train().loss(*batch).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            # A key bias adds the same number to every score, which softmax ignores.
            if "key.bias" not in name:
                assert parameter.grad.abs().max() > 1e-9, name


def test_prefill_then_batched_decode_equals_full_forward_passes(model) -> None:
    """Prefill rows of a larger state one by one, then decode them together, as the engine does."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCAB_SIZE, (1, length), generator=generator) for length in (5, 1, 8)]
    state = model.init_state(4, CONTEXT_LENGTH)
    features_BD = torch.cat(
        [model.prefill(prompt, batch_slice(state, i, i + 1)) for i, prompt in enumerate(prompts)]
    )
    sequences = [prompt[0].tolist() for prompt in prompts]
    for _ in range(5):
        next_B = model.logits(features_BD).argmax(dim=-1)
        for sequence, token in zip(sequences, next_B.tolist(), strict=True):
            sequence.append(token)
        features_BD = model.features(next_B.unsqueeze(1), batch_slice(state, 0, 3))[:, 0]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        length = prompt.shape[1]
        for end in range(length, length + 5):
            tokens_BT = torch.tensor([sequence[:end]])
            if isinstance(model, EncoderDecoder):
                encoded = model.encode_source(prompt, torch.tensor([length]))
                logits_BTV = model.logits(model.features(tokens_BT[:, length - 1 :], encoded))
            else:
                logits_BTV = model(tokens_BT)
            assert logits_BTV[0, -1].argmax() == sequence[end]


def test_text_targets_depend_on_all_tokens_before_them_and_none_after(model) -> None:
    """Each of the last `max_scored_tokens` targets sees all tokens before it; none a later one."""
    tokens_BT = torch.randint(VOCAB_SIZE, (1, 11), generator=torch.Generator().manual_seed(3))
    targets_BT = torch.randint(VOCAB_SIZE, (1, 11), generator=torch.Generator().manual_seed(4))
    before = model.nll(tokens_BT, targets_BT)
    scored = 5 if isinstance(model, EncoderDecoder) else 11
    assert_equal(model.loss(tokens_BT, targets_BT), before[:, -scored:].mean())
    for position in range(11):
        changed_BT = tokens_BT.clone()
        changed_BT[0, position] = (changed_BT[0, position] + 1) % VOCAB_SIZE
        differs_T = (model.nll(changed_BT, targets_BT) - before)[0].abs() > 1e-9
        assert not differs_T[:position].any()
        assert differs_T[max(position, 11 - scored) :].all()


def test_a_single_token_can_be_scored(model) -> None:
    token = torch.tensor([[3]])
    assert model.nll(token, token).shape == (1, 1)
    assert_equal(model.loss(token, token), model.nll(token, token).mean())


def test_ignored_targets_do_not_change_others(model) -> None:
    tokens_BT, targets_BT = torch.randint(
        VOCAB_SIZE, (2, 3, 12), generator=torch.Generator().manual_seed(5)
    )
    late_BT = targets_BT.clone()
    late_BT[:, : 12 - model.max_scored_tokens] = -100
    all_nll, late_nll = model.nll(tokens_BT, targets_BT), model.nll(tokens_BT, late_BT)
    assert_equal(late_nll, all_nll.where(late_BT != -100, 0.0))


@pytest.mark.parametrize("name", ["seq2seq", "attention", "transformer"])
def test_training_includes_short_sources(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name).train()
    sources = []

    def encode(source_BS: Tensor, lengths_B: Tensor) -> State:
        sources.extend(
            row[:length].tolist() for row, length in zip(source_BS, lengths_B.tolist(), strict=True)
        )
        return type(model).encode(model, source_BS, lengths_B)

    monkeypatch.setattr(model, "encode", encode)
    tokens_BT = torch.arange(CONTEXT_LENGTH).expand(200, -1)
    model.loss(tokens_BT, tokens_BT)
    half = list(range(CONTEXT_LENGTH // 2 + 1))
    assert {tuple(source) for source in sources} == {tuple(half[i:]) for i in range(len(half))}
    assert 80 < sum(source == half for source in sources) < 140


def test_a_model_that_cannot_translate_says_so(pairs) -> None:
    class TextOnly(LanguageModel):
        pass

    model = TextOnly(5, 4)
    for call in (lambda: model.encode_source(*pairs[:2]), lambda: model.loss(*pairs)):
        with pytest.raises(ValueError, match="TextOnly does not translate"):
            call()


START, EOS = 0, 1


def greedy(model: LanguageModel, source: list[int], max_tokens: int, eos_token: int) -> list[int]:
    """Decode greedily, from the source again for every token."""
    target = [START]
    while len(target) <= max_tokens:
        state = model.encode_source(torch.tensor([source]), torch.tensor([len(source)]))
        logits_BTV = model.logits(model.features(torch.tensor([target]), state))
        token = int(logits_BTV[0, -1].argmax())
        if token == eos_token:
            break
        target.append(token)
    return target[1:]


def score(
    model: LanguageModel, source: list[int], target: list[int], length_penalty: float
) -> float:
    """Return the score of a target that may end with EOS."""
    nll_BT = model.nll(
        torch.tensor([source]),
        torch.tensor([len(source)]),
        torch.tensor([[START, *target[:-1]]]),
        torch.tensor([target]),
    )
    return -nll_BT.sum().item() / len(target) ** length_penalty


def random_sources(vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(6)
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist()
        for length in (4, 1, 7, 5, 9, 2, 3, 6)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_one_beam_is_greedy_for_a_batch_of_sentences(name: str) -> None:
    model = build(name, vocab_size=5)
    sources = random_sources(5)
    lengths = set()
    for eos in range(5):
        targets = translate(model, sources, decoder_start_token=START, eos_token=eos, max_tokens=7)
        assert targets == [greedy(model, source, 7, eos) for source in sources]
        lengths |= {len(target) for target in targets}
    assert len(lengths) > 1  # the targets end at different steps


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["attention", "transformer", "gpt"])
def test_many_beams_equal_exhaustive_search(name: str, length_penalty: float) -> None:
    model = build(name, vocab_size=4)
    sources = random_sources(4)
    words = [token for token in range(4) if token != EOS]
    candidates = [
        [*target, *([EOS] if length < 3 else [])]
        for length in range(4)
        for target in itertools.product(words, repeat=length)
    ]
    targets = translate(
        model,
        sources,
        decoder_start_token=START,
        eos_token=EOS,
        max_tokens=3,
        num_beams=64,
        length_penalty=length_penalty,
    )
    for source, target in zip(sources, targets, strict=True):
        best = max(candidates, key=lambda target: score(model, source, target, length_penalty))
        assert target == [token for token in best if token != EOS]


def test_more_beams_are_no_worse_and_sentences_are_independent(model) -> None:
    sources = random_sources()
    targets = translate(
        model, sources, decoder_start_token=START, eos_token=EOS, max_tokens=6, num_beams=4
    )
    for source, target in zip(sources, targets, strict=True):
        assert [target] == translate(
            model, [source], decoder_start_token=START, eos_token=EOS, max_tokens=6, num_beams=4
        )

    def total_score(targets: list[list[int]]) -> float:
        complete = [[*target, EOS][:6] for target in targets]
        return sum(map(lambda s, t: score(model, s, t, 1.0), sources, complete))

    assert total_score(targets) >= total_score(
        translate(model, sources, decoder_start_token=START, eos_token=EOS, max_tokens=6)
    )


def test_a_target_ends_at_the_models_context_length() -> None:
    for name, max_length in (
        ("transformer", CONTEXT_LENGTH),
        ("gpt", CONTEXT_LENGTH - 9),
        ("seq2seq", 40),
    ):
        model = build(name)
        source = random_sources()[4]
        [target] = translate(
            model, [source], decoder_start_token=START, eos_token=VOCAB_SIZE, max_tokens=40
        )
        assert len(target) == max_length
    with pytest.raises(ValueError, match=r"16 tokens long.*no room"):
        translate(build("gpt"), [[2] * 16], decoder_start_token=START, eos_token=EOS, max_tokens=5)


def test_invalid_options_and_sources_are_refused() -> None:
    model = build("seq2seq")
    assert translate(model, [], decoder_start_token=START, eos_token=EOS, max_tokens=5) == []
    with pytest.raises(ValueError, match="source sentence is empty"):
        translate(model, [[1], []], decoder_start_token=START, eos_token=EOS, max_tokens=5)
    with pytest.raises(ValueError, match=r"num_beams and max_tokens must be at least 1.*0, 5"):
        translate(model, [[1]], decoder_start_token=START, eos_token=EOS, max_tokens=5, num_beams=0)

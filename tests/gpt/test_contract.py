"""Properties that every language model must have."""

import pytest
import torch
from torch import Tensor, nn

from gpt import MODELS, LanguageModel
from gpt.checkpoint import (
    build_model,
    load_language_model,
    load_tensors,
    save_config,
    save_tensors,
    unique_state_dict,
)
from gpt.models.base import batch_slice

VOCABULARY, CONTEXT = 50, 24

VARIANTS = {
    "sigma-pi": ("sigma-pi", {"window": 5, "width": 24, "hidden": 32}),
    "sigma-pi-1": ("sigma-pi", {"window": 1, "width": 24, "hidden": 32}),
    "softmax": ("softmax", {}),
    "mlp": ("mlp", {"window": 5, "width": 24, "hidden": 32}),
    "mlp-deep": (
        "mlp",
        {"window": 30, "width": 24, "hidden": 32, "depth": 2, "activation": "relu"},
    ),
    "experts": ("experts", {"window": 5, "width": 24, "hidden": 32, "experts": 3}),
    "rnn": ("rnn", {"width": 32}),
    "lstm": ("lstm", {"width": 64, "embedding_width": 48}),
    "lstm-tied": ("lstm", {"width": 48, "depth": 1, "tied": True}),
    "gru": ("gru", {"width": 32}),
    "seq2seq": ("seq2seq", {"width": 32, "depth": 2}),
    "attention": ("attention", {"width": 32}),
    "transformer": ("transformer", {"width": 32, "depth": 2, "heads": 2}),
    "gpt2": ("gpt2", {"width": 32, "depth": 2, "heads": 2}),
    "gpt": ("gpt", {"width": 32, "depth": 2, "heads": 2}),
    "gpt-ngrams": ("gpt", {"width": 32, "depth": 2, "heads": 2, "ngrams": 600}),
    "gpt-grouped": (
        "gpt",
        {"width": 40, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 16},
    ),
    "gpt-tied": ("gpt", {"width": 32, "depth": 2, "heads": 2, "tied": True}),
}


def test_every_model_has_a_variant_here() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(MODELS)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model in float64 with weights large enough that every part of it affects the output."""
    torch.manual_seed(0)
    name, kwargs = VARIANTS[request.param]
    model = (
        build_model(name, {"vocab_size": VOCABULARY, "context_length": CONTEXT, **kwargs})
        .double()
        .eval()
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def tokens_BT() -> Tensor:
    return torch.randint(VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(1))


def test_logits_have_the_shape_of_the_tokens_and_the_vocabulary(
    model: LanguageModel, tokens_BT: Tensor
) -> None:
    assert model(tokens_BT).shape == (3, CONTEXT, VOCABULARY)


@pytest.mark.parametrize("position", [1, 11, CONTEXT - 1])
def test_logits_do_not_depend_on_future_tokens(
    model: LanguageModel, tokens_BT: Tensor, position: int
) -> None:
    changed_BT = tokens_BT.clone()
    changed_BT[:, position:] = (changed_BT[:, position:] + 1) % VOCABULARY
    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.allclose(before[:, position:], after[:, position:])


@pytest.mark.parametrize(
    "chunks", [[CONTEXT], [1] * CONTEXT, [7, 1, 5, 11], [23, 1], [1, 23]], ids=str
)
def test_stateful_equals_stateless(
    model: LanguageModel, tokens_BT: Tensor, chunks: list[int]
) -> None:
    state = model.init_state(3, CONTEXT)
    logits = [model(chunk_BT, state) for chunk_BT in tokens_BT.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens_BT), rtol=0, atol=1e-12)


def test_sequences_of_different_lengths_continue_in_one_batch(
    model: LanguageModel, tokens_BT: Tensor
) -> None:
    expected = model(tokens_BT)
    state = model.init_state(4, CONTEXT)
    lengths = [9, 3, 20]
    for i, length in enumerate(lengths):
        model(tokens_BT[i : i + 1, :length], batch_slice(state, i, i + 1))
    for step in range(3):
        positions_B = torch.tensor(lengths) + step
        new_B1 = tokens_BT[torch.arange(3), positions_B].unsqueeze(1)
        logits_BV = model(new_B1, batch_slice(state, 0, 3))[:, 0]
        expected_BV = expected[torch.arange(3), positions_B]
        torch.testing.assert_close(logits_BV, expected_BV, rtol=0, atol=1e-12)


def test_a_copied_state_continues_its_sequence(model: LanguageModel, tokens_BT: Tensor) -> None:
    state = model.init_state(2, CONTEXT)
    model(tokens_BT[:1, :4], batch_slice(state, 0, 1))
    model(tokens_BT[1:2, :10], batch_slice(state, 1, 2))
    for tensor in state.values():
        tensor[0] = tensor[1]
    logits_V = model(tokens_BT[1:2, 10:11], batch_slice(state, 0, 1))[0, 0]
    torch.testing.assert_close(logits_V, model(tokens_BT)[1, 10], rtol=0, atol=1e-12)


def test_loss_equals_torch_cross_entropy_of_the_logits(
    model: LanguageModel, tokens_BT: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets_BT = tokens_BT.roll(-1, dims=1)
    targets_BT[0, 3:9] = -100
    features_BTD, scored_BT = model.features_and_targets(tokens_BT, targets_BT)
    assert scored_BT.shape[1] == model.max_scored_tokens
    logits_NV = model.logits(features_BTD).flatten(0, 1)
    expected = nn.functional.cross_entropy(logits_NV, scored_BT.flatten())
    expected_N = nn.functional.cross_entropy(logits_NV, scored_BT.flatten(), reduction="none")
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for max_logits in (2**26, 7 * VOCABULARY):  # all at once, and seven positions at a time
        monkeypatch.setattr("gpt.models.base.MAX_LOGITS", max_logits)
        model.zero_grad()
        loss = model.loss(tokens_BT, targets_BT)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            model.nll(tokens_BT, targets_BT)[:, -model.max_scored_tokens :].flatten(), expected_N
        )
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_a_saved_and_loaded_model_gives_the_same_logits(
    model: LanguageModel, tokens_BT: Tensor, tmp_path, request: pytest.FixtureRequest
) -> None:
    name, kwargs = VARIANTS[request.node.callspec.params["model"]]
    model = model.float()
    save_config(tmp_path, name, {"vocab_size": VOCABULARY, "context_length": CONTEXT, **kwargs})
    save_tensors(tmp_path / "model.safetensors", unique_state_dict(model))
    loaded = load_language_model(tmp_path)
    assert torch.equal(loaded(tokens_BT), model(tokens_BT))
    assert load_tensors(tmp_path / "model.safetensors").keys() == unique_state_dict(loaded).keys()


SEES_ONE_TOKEN = {"softmax": 1e-1, "sigma-pi-1": 1e-2}
"""Variants whose prediction depends on the last token only, and their learning rates."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_one_batch(variant: str, tokens_BT: Tensor) -> None:
    torch.manual_seed(0)
    name, kwargs = VARIANTS[variant]
    if variant in SEES_ONE_TOKEN:
        positions_BT = torch.arange(CONTEXT) + torch.tensor([[0], [17], [31]])
        tokens_BT = torch.randperm(VOCABULARY)[positions_BT % VOCABULARY]
    model = build_model(name, {"vocab_size": VOCABULARY, "context_length": CONTEXT, **kwargs})
    optimizer = torch.optim.Adam(model.parameters(), lr=SEES_ONE_TOKEN.get(variant, 1e-2))
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_more_tokens_than_the_context_length_raise(model: LanguageModel) -> None:
    if model.max_length is None:
        return
    with pytest.raises(ValueError, match=r"25 tokens.*24"):
        model(torch.zeros(1, CONTEXT + 1, dtype=torch.long))

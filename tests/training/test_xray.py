"""X-rays: what is reported is what the forward pass uses, and how it is drawn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt.models.attention
from gpt import MODELS
from gpt.beam_search import translate
from gpt.checkpoint import save_config, save_tensors, unique_state_dict
from gpt.models.seq2seq import reversed_indices
from tokenizer import byte_tokenizer
from training.plots.commands import Xray

VOCABULARY, CONTEXT = 23, 16
SMALL = {
    "sigma-pi": {"window": 3, "width": 8, "hidden": 10},
    "softmax": {},
    "mlp": {"window": 4, "width": 8, "hidden": 10},
    "experts": {"window": 4, "width": 8, "hidden": 10, "experts": 5},
    "rnn": {"width": 8},
    "lstm": {"width": 8, "embedding_width": 6},
    "gru": {"width": 8},
    "seq2seq": {"width": 8},
    "attention": {"width": 8},
    "transformer": {"width": 8, "heads": 2},
    "gpt2": {"width": 8, "depth": 3, "heads": 2},
    "gpt": {"width": 8, "depth": 3, "heads": 2},
}
TOKENS_BT = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
SOURCE_BS = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
LENGTHS_B = torch.tensor([7, 4])
PAIR = (SOURCE_BS, LENGTHS_B, TOKENS_BT[:, :5])


def build(name, **more):
    """In float64, with weights such that every part of the model matters."""
    torch.manual_seed(0)
    model = MODELS[name](VOCABULARY, CONTEXT, **{**SMALL[name], **more}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model


def named(model, *batch: Tensor) -> dict[str, Tensor]:
    return {one.name: one.weights for one in model.xray(*batch)}


TRANSLATE = ["seq2seq", "attention", "transformer", "gpt2", "gpt"]


@pytest.mark.parametrize("name", MODELS)
def test_every_language_model_says_what_stands_at_each_axis(name):
    model = build(name)
    for batch in [(TOKENS_BT,), (TOKENS_BT[:, :1],), *[PAIR] * (name in TRANSLATE)]:
        found = model.xray(*batch)
        assert found
        assert len({one.name for one in found}) == len(found)
        for one in found:
            rows, _, _, height, width = one.weights.shape
            assert one.rows.shape == (rows, height) == (2, height)
            if isinstance(one.columns, Tensor):
                assert one.columns.shape == (2, width)
            else:
                assert one.columns in ("units", "experts")
            assert one.weights.isfinite().all()
            assert not one.weights.requires_grad


@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(TRANSLATE)))
def test_pairs_are_refused_by_a_model_that_does_not_translate(name):
    with pytest.raises(ValueError, match="does not translate"):
        build(name).xray(*PAIR)


@pytest.mark.parametrize("name", TRANSLATE[:3])
def test_of_a_text_an_encoder_decoder_reads_the_first_half_and_writes_the_second(name):
    model = build(name)
    found = model.xray(TOKENS_BT)
    halves = model.xray(TOKENS_BT[:, :7], torch.tensor([7, 7]), TOKENS_BT[:, 6:])
    for one, half in zip(found, halves, strict=True):
        assert one.name == half.name
        assert torch.equal(one.rows, half.rows)
        assert torch.equal(one.weights, half.weights)


@pytest.mark.parametrize("name", ["gpt2", "gpt"])
def test_a_pair_is_one_text_to_a_decoder_alone(name):
    model = build(name)
    of_pair = model.xray(*PAIR)[0]
    joined_N = torch.cat([SOURCE_BS[1, :4], TOKENS_BT[1, :5]])
    of_text = model.xray(joined_N.unsqueeze(0))[0]
    assert torch.equal(of_pair.rows[1, :9], joined_N)
    torch.testing.assert_close(of_pair.weights[1, ..., :9, :9], of_text.weights[0])


@pytest.mark.parametrize(
    ("name", "batch"),
    [(name, batch) for name in TRANSLATE[2:] for batch in [(TOKENS_BT,), PAIR]],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_averaged_by_its_maps_attention_gives_the_same_features(name, batch, monkeypatch):
    model = build(name)
    maps = named(model, *batch)
    targets = (batch[-1],)
    expected_BTD, _ = model.features_and_targets(*batch, *targets)
    if name == "transformer":
        layers_BHTS = [*maps["encoder attention"].unbind(1)]
        for both in zip(
            *(maps[k].unbind(1) for k in ("decoder attention", "cross-attention")), strict=True
        ):
            layers_BHTS += both
    else:
        layers_BHTS = [*maps["attention"].unbind(1)]
    left = iter(layers_BHTS)

    def by_map(queries_BHTK, keys_BHSK, values_BHSK, **_):
        return next(left) @ values_BHSK

    monkeypatch.setattr(gpt.models.attention.F, "scaled_dot_product_attention", by_map)
    got_BTD, _ = model.features_and_targets(*batch, *targets)
    assert next(left, None) is None
    torch.testing.assert_close(got_BTD, expected_BTD)


def test_attention_maps_sum_to_one_and_are_exactly_zero_on_future_and_padding():
    for name in TRANSLATE[2:]:
        for kind, weights_BLHTS in named(build(name), *PAIR).items():
            sums = weights_BLHTS.sum(-1)
            torch.testing.assert_close(sums, torch.ones_like(sums))
            if kind in ("attention", "decoder attention"):
                assert (weights_BLHTS.triu(1) == 0).all()
                assert (
                    weights_BLHTS + weights_BLHTS.new_ones(weights_BLHTS.shape).triu(1) > 0
                ).all()
            else:
                assert (weights_BLHTS[1, ..., 4:] == 0).all()
                assert (weights_BLHTS[1, ..., :4] > 0).all()


def test_an_alignment_is_what_the_readout_uses():
    model = build("attention")
    seen = named(model, *PAIR)
    source_BS, lengths_B, tokens_BT = PAIR
    memory_BSD = model.encode(source_BS, lengths_B)["memory"]
    contexts_BTD = seen["alignment of the next token"][:, 0, 0] @ memory_BSD
    hidden_BTD = seen["decoder hidden"][:, 0, 0]
    all_BTD = torch.cat([hidden_BTD, contexts_BTD, model.embedding(tokens_BT)], dim=-1)
    expected_BTD, _ = model.features_and_targets(*PAIR, tokens_BT)
    torch.testing.assert_close(torch.tanh(model.readout(all_BTD)), expected_BTD)
    ahead_D, back_D = memory_BSD[1, 3].chunk(2)
    torch.testing.assert_close(seen["forward encoder hidden"][1, 0, 0, 3], ahead_D)
    torch.testing.assert_close(seen["backward encoder hidden"][1, 0, 0, 0], back_D)


def before(memory_BLTD: Tensor, first: Tensor | None = None) -> Tensor:
    """The memory that each step began with."""
    first = torch.zeros_like(memory_BLTD[:, :, 0]) if first is None else first
    return torch.cat([first.unsqueeze(2), memory_BLTD[:, :, :-1]], dim=2)


def test_recurrent_gates_recompute_the_memories():
    for name in ("rnn", "lstm", "gru"):
        model = build(name)
        seen = named(model, TOKENS_BT)
        torch.testing.assert_close(seen["hidden"][:, -1, 0], model.features(TOKENS_BT))
        state = model.init_state(2, 12)
        model.features(TOKENS_BT, state)
        for memory, last_BLD in state.items():
            torch.testing.assert_close(seen[memory][:, :, 0, -1], last_BLD)
        seen = {kind: weights.squeeze(2) for kind, weights in seen.items()}
        if name == "lstm":
            kept = seen["forget gate"] * before(seen["cell"])
            written = seen["input gate"] * seen["candidate"]
            torch.testing.assert_close(seen["cell"], kept + written)
            shown = seen["output gate"] * seen["cell"].tanh()
            torch.testing.assert_close(seen["hidden"], shown)
        if name == "gru":
            z, h = seen["carry gate"], seen["hidden"]
            torch.testing.assert_close(h, z * before(h) + (1 - z) * seen["candidate"])


@pytest.mark.parametrize("reverse", [False, True])
def test_an_encoder_decoders_gates_recompute_its_memories(reverse):
    model = build("seq2seq", reverse=reverse)
    found = model.xray(*PAIR)
    seen = {one.name: one.weights.squeeze(2) for one in found}
    first_BLD = model.encode(SOURCE_BS, LENGTHS_B)["hidden"]
    for network, first in (("encoder", torch.zeros_like(first_BLD)), ("decoder", first_BLD)):
        z, n, h = (seen[f"{network} {name}"] for name in ("carry gate", "candidate", "hidden"))
        torch.testing.assert_close(h, z * before(h, first) + (1 - z) * n)
    torch.testing.assert_close(seen["encoder hidden"][1, :, 3], first_BLD[1])
    expected_BTD, _ = model.features_and_targets(*PAIR, PAIR[-1])
    torch.testing.assert_close(seen["decoder hidden"][:, -1], expected_BTD)
    read_BS = SOURCE_BS.gather(1, reversed_indices(LENGTHS_B, 7)) if reverse else SOURCE_BS
    assert torch.equal(found[0].rows, read_BS)


def test_experts_are_those_that_the_features_are_made_of():
    model = build("experts")
    gates_BTE = named(model, TOKENS_BT)["experts"][:, 0, 0]
    hidden_BTF = model.hidden(TOKENS_BT, None)
    said_BTEF = model.mixture.experts(hidden_BTF).unflatten(-1, (5, -1))
    mixed_BTF = (gates_BTE.unsqueeze(-1) * said_BTEF).sum(-2)
    features_BTF = F.rms_norm(mixed_BTF, mixed_BTF.shape[-1:])
    torch.testing.assert_close(features_BTF, model.features(TOKENS_BT))


def test_a_windows_effect_is_what_one_token_alone_does_to_it():
    """Token s alone in the window of token t, and nothing at its other places."""
    for name in ("sigma-pi", "mlp"):
        model = build(name)
        effect_TS = named(model, TOKENS_BT)["token contribution"][0, 0, 0]
        for t in range(12):
            for s in range(12):
                if not 0 <= t - s < model.window:
                    assert effect_TS[t, s] == 0
                    continue
                window_WD = torch.zeros(model.window, 8, dtype=torch.float64)
                window_WD[model.window - 1 - (t - s)] = model.embedding.weight[TOKENS_BT[0, s]]
                if name == "mlp":
                    first = model.layers.layers[0]
                    changed = first(window_WD.t().flatten()) - first.bias
                else:
                    each = model.factors(window_WD).unflatten(-1, (model.window, -1))
                    changed = torch.stack([1 + each[w, w] for w in range(model.window)]).prod(0) - 1
                torch.testing.assert_close(effect_TS[t, s], changed.norm())


def test_of_a_bigram_only_the_last_token_counts():
    weights_BLHTS = named(build("softmax"), TOKENS_BT)["last token"]
    assert torch.equal(weights_BLHTS[1, 0, 0], torch.eye(12))


TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token


def make_run(directory: Path, name: str, **run: str) -> Path:
    torch.manual_seed(0)
    given = {"vocab_size": TOKENIZER.vocab_size, "context_length": CONTEXT, **SMALL[name]}
    model = MODELS[name](**given)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    save_config(directory, name, given)
    save_tensors(directory / "model.safetensors", unique_state_dict(model))
    TOKENIZER.save(directory / "tokenizer.json")
    if run:
        (directory / "run.json").write_text(json.dumps({"format": 1, "run": run}))
    return directory


def test_a_picture_names_tokens_layers_heads_and_scales(tmp_path, capsys):
    run, output = make_run(tmp_path, "gpt"), tmp_path / "of" / "xray.svg"
    Xray(run, "a $x$\n\té中", output=output)()
    said = capsys.readouterr().out.splitlines()
    assert said == ["attention: 3 layers x 2 heads x 12 tokens x 12 tokens", str(output)]
    for text in (">attention: 0 to 1<", ">layer 3, head 2<", ">$<", ">·<", ">↵<", ">⇥<"):
        assert text in output.read_text()
    assert output.read_text().count(">layer ") == 6
    assert ">\\xc3<" in output.read_text()  # half of a character
    first = output.read_bytes()
    Xray(run, "a $x$\n\té中", output=output)()
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("lstm", ["input gate", "forget gate", "candidate", "output gate", "hidden", "cell"]),
        ("experts", ["experts", "token contribution"]),
        (
            "attention",
            ["alignment of the next token", "backward encoder hidden", "decoder reset gate"],
        ),
    ],
)
def test_every_kind_is_drawn_under_its_name(name, titles, tmp_path):
    Xray(make_run(tmp_path, name), "some text", output=tmp_path / "xray.svg")()
    for title in titles:
        assert f">{title}: " in (tmp_path / "xray.svg").read_text()


def test_what_is_asked_for_is_drawn_alone(tmp_path, capsys):
    output = tmp_path / "xray.svg"
    Xray(make_run(tmp_path, "attention"), "some text", only="decoder", output=output)()
    assert "alignment" not in output.read_text() + capsys.readouterr().out
    assert ">decoder hidden: " in output.read_text()


def test_a_long_text_is_drawn_small(tmp_path, monkeypatch):
    monkeypatch.setattr("training.plots.plot.PIXELS", 500)
    output = tmp_path / "xray.png"
    Xray(make_run(tmp_path, "softmax"), "x" * 60, output=output)()
    width, height = (int.from_bytes(output.read_bytes()[at : at + 4]) for at in (16, 20))
    assert 300 < width <= height <= 500


@pytest.mark.parametrize("name", ["attention", "gpt"])
def test_a_run_that_translates_finds_the_translation_itself(name, tmp_path, capsys):
    run, output = make_run(tmp_path, name, task="translation", model=name), tmp_path / "xray.svg"
    Xray(run, "chat", output=output)()
    by_itself = output.read_text()
    found = capsys.readouterr().out.splitlines()[0]
    model = gpt.checkpoint.open_language_model(run)
    ids = TOKENIZER.encode("chat")
    [written] = translate(model, [ids], decoder_start_token=END, eos_token=END, max_tokens=CONTEXT)
    assert found == TOKENIZER.decode(written).strip()
    make_run(tmp_path, name, task="text", model=name)
    Xray(run, "chat", output=output)()
    assert output.read_text() != by_itself


def test_a_translation_can_be_given(tmp_path, capsys):
    output = tmp_path / "xray.svg"
    Xray(make_run(tmp_path, "transformer"), "chat", translation="cat", output=output)()
    assert "cross-attention: 2 layers x 2 heads x 4 tokens x 4 tokens" in capsys.readouterr().out
    assert ">&lt;|endoftext|&gt;<" in output.read_text()


def test_mistakes_are_one_line(tmp_path):
    run, output = make_run(tmp_path, "gpt"), tmp_path / "xray.png"
    lstm = tmp_path / "lstm"
    lstm.mkdir()
    make_run(lstm, "lstm")
    linear = tmp_path / "linear"
    linear.mkdir()
    save_config(linear, "linear", {"inputs": 1})
    save_tensors(linear / "model.safetensors", unique_state_dict(gpt.CHAPTERS["linear"]()))
    for wrong, expected in (
        (Xray(run, "", output=output), "TEXT is 0 tokens long: expected 1 to 1000"),
        (Xray(lstm, "x" * 1001, output=output), "TEXT is 1001 tokens long"),
        (Xray(run, "x" * 17, output=output), "17 tokens do not fit in the context of 16"),
        (Xray(run, "x", output=tmp_path / "x.gif"), "--output must end in .svg, .png or .pdf"),
        (Xray(lstm, "x", translation="y", output=output), "LSTM does not translate"),
        (Xray(linear, "x", output=output), "Linear is not a language model"),
        (Xray(tmp_path / "none", "x", output=output), "no such run directory"),
        (Xray(run, "x", only="gate", output=output), "no such name; there are attention"),
    ):
        with pytest.raises(ValueError, match=expected):
            wrong()
    save_config(lstm, "lstm", {"vocab_size": 100, "context_length": 8, **SMALL["lstm"]})
    small = MODELS["lstm"](100, 8, **SMALL["lstm"])
    save_tensors(lstm / "model.safetensors", unique_state_dict(small))
    done = subprocess.run(
        [sys.executable, "-m", "gpt", "xray", lstm, "x", "--output", output],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the model has 100 tokens and its tokenizer.json 257" in done.stderr
    assert not output.exists()

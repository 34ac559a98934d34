"""Activation maps: they are what the forward pass computes with, and how `xray` draws them."""

import itertools
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

VOCAB_SIZE, CONTEXT_LENGTH = 23, 16
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
TOKENS_BT = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
SOURCE_BS = torch.randint(VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(2))
LENGTHS_B = torch.tensor([7, 4])
PAIR = (SOURCE_BS, LENGTHS_B, TOKENS_BT[:, :5])


def build(name, **model_args):
    """A small float64 model in which every part affects the output."""
    torch.manual_seed(0)
    model = (
        MODELS[name](VOCAB_SIZE, CONTEXT_LENGTH, **{**SMALL[name], **model_args}).double().eval()
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model


def weights_by_name(model, *batch: Tensor) -> dict[str, Tensor]:
    return {activation.name: activation.weights for activation in model.xray(*batch)}


TRANSLATORS = ["seq2seq", "attention", "transformer", "gpt2", "gpt"]


@pytest.mark.parametrize("name", MODELS)
def test_activation_maps_describe_their_axes(name):
    model = build(name)
    for batch in [(TOKENS_BT,), (TOKENS_BT[:, :1],), *[PAIR] * (name in TRANSLATORS)]:
        maps = model.xray(*batch)
        assert maps
        assert len({activation.name for activation in maps}) == len(maps)
        for activation in maps:
            rows, _, _, height, width = activation.weights.shape
            assert activation.rows.shape == (rows, height) == (2, height)
            if isinstance(activation.columns, Tensor):
                assert activation.columns.shape == (2, width)
            else:
                assert activation.columns in ("units", "experts")
            assert activation.weights.isfinite().all()
            assert not activation.weights.requires_grad


@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(TRANSLATORS)))
def test_models_that_do_not_translate_reject_pairs(name):
    with pytest.raises(ValueError, match="does not translate"):
        build(name).xray(*PAIR)


@pytest.mark.parametrize("name", TRANSLATORS[:3])
def test_encoder_decoder_splits_a_text_into_source_and_target(name):
    model = build(name)
    maps = model.xray(TOKENS_BT)
    pair_maps = model.xray(TOKENS_BT[:, :7], torch.tensor([7, 7]), TOKENS_BT[:, 6:])
    for text_map, pair_map in zip(maps, pair_maps, strict=True):
        assert text_map.name == pair_map.name
        assert torch.equal(text_map.rows, pair_map.rows)
        assert torch.equal(text_map.weights, pair_map.weights)


@pytest.mark.parametrize("name", ["gpt2", "gpt"])
def test_decoder_only_model_reads_a_pair_as_one_text(name):
    model = build(name)
    pair_map = model.xray(*PAIR)[0]
    joined_N = torch.cat([SOURCE_BS[1, :4], TOKENS_BT[1, :5]])
    text_map = model.xray(joined_N.unsqueeze(0))[0]
    assert torch.equal(pair_map.rows[1, :9], joined_N)
    torch.testing.assert_close(pair_map.weights[1, ..., :9, :9], text_map.weights[0])


@pytest.mark.parametrize(
    ("name", "batch"),
    [(name, batch) for name in TRANSLATORS[2:] for batch in [(TOKENS_BT,), PAIR]],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_attention_maps_reproduce_the_features(name, batch, monkeypatch):
    model = build(name)
    maps = weights_by_name(model, *batch)
    expected_BTD, _ = model.features_and_targets(*batch, batch[-1])
    if name == "transformer":
        layers_BHTS = [*maps["encoder attention"].unbind(1)]
        for self_and_cross in zip(
            *(maps[k].unbind(1) for k in ("decoder attention", "cross-attention")), strict=True
        ):
            layers_BHTS += self_and_cross
    else:
        layers_BHTS = [*maps["attention"].unbind(1)]
    remaining = iter(layers_BHTS)

    def attention_by_map(queries_BHTK, keys_BHSK, values_BHSK, **_):
        return next(remaining) @ values_BHSK

    monkeypatch.setattr(gpt.models.attention.F, "scaled_dot_product_attention", attention_by_map)
    features_BTD, _ = model.features_and_targets(*batch, batch[-1])
    assert next(remaining, None) is None
    torch.testing.assert_close(features_BTD, expected_BTD)


def test_attention_maps_sum_to_one_and_are_zero_on_future_and_padding():
    for name in TRANSLATORS[2:]:
        for kind, weights_BLHTS in weights_by_name(build(name), *PAIR).items():
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


def test_alignments_reproduce_the_readout():
    model = build("attention")
    maps = weights_by_name(model, *PAIR)
    source_BS, lengths_B, tokens_BT = PAIR
    memory_BSD = model.encode(source_BS, lengths_B)["memory"]
    contexts_BTD = maps["alignment"][:, 0, 0] @ memory_BSD
    hidden_BTD = maps["decoder hidden"][:, 0, 0]
    all_BTD = torch.cat([hidden_BTD, contexts_BTD, model.embedding(tokens_BT)], dim=-1)
    expected_BTD, _ = model.features_and_targets(*PAIR, tokens_BT)
    torch.testing.assert_close(torch.tanh(model.readout(all_BTD)), expected_BTD)
    forward_D, backward_D = memory_BSD[1, 3].chunk(2)
    torch.testing.assert_close(maps["forward encoder hidden"][1, 0, 0, 3], forward_D)
    torch.testing.assert_close(maps["backward encoder hidden"][1, 0, 0, 0], backward_D)


def test_alignment_rows_are_the_tokens_that_are_written():
    model = build("attention")
    source_BS, _, tokens_BT = PAIR
    alignment = model.xray(*PAIR)[0]
    features_BTD, _ = model.features_and_targets(*PAIR, tokens_BT)
    assert torch.equal(alignment.rows[:, :-1], tokens_BT[:, 1:])
    assert torch.equal(alignment.rows[:, -1], model.logits(features_BTD)[:, -1].argmax(-1))
    assert torch.equal(alignment.columns, source_BS)


def previous(memory_BLTD: Tensor, first: Tensor | None = None) -> Tensor:
    """The state before each step."""
    first = torch.zeros_like(memory_BLTD[:, :, 0]) if first is None else first
    return torch.cat([first.unsqueeze(2), memory_BLTD[:, :, :-1]], dim=2)


def test_recurrent_gates_reproduce_the_states():
    for name in ("rnn", "lstm", "gru"):
        model = build(name)
        maps = weights_by_name(model, TOKENS_BT)
        torch.testing.assert_close(maps["hidden"][:, -1, 0], model.features(TOKENS_BT))
        state = model.init_state(2, 12)
        model.features(TOKENS_BT, state)
        for memory, last_BLD in state.items():
            torch.testing.assert_close(maps[memory][:, :, 0, -1], last_BLD)
        maps = {kind: weights.squeeze(2) for kind, weights in maps.items()}
        if name == "lstm":
            remembered = maps["forget gate"] * previous(maps["cell"])
            written = maps["input gate"] * maps["candidate"]
            torch.testing.assert_close(maps["cell"], remembered + written)
            output = maps["output gate"] * maps["cell"].tanh()
            torch.testing.assert_close(maps["hidden"], output)
        if name == "gru":
            z, h = maps["carry gate"], maps["hidden"]
            torch.testing.assert_close(h, z * previous(h) + (1 - z) * maps["candidate"])


@pytest.mark.parametrize("reverse", [False, True])
def test_encoder_decoder_gates_reproduce_the_states(reverse):
    model = build("seq2seq", reverse=reverse)
    activations = model.xray(*PAIR)
    maps = {each.name: each.weights.squeeze(2) for each in activations}
    first_BLD = model.encode(SOURCE_BS, LENGTHS_B)["hidden"]
    for network, first in (("encoder", torch.zeros_like(first_BLD)), ("decoder", first_BLD)):
        z, n, h = (maps[f"{network} {name}"] for name in ("carry gate", "candidate", "hidden"))
        torch.testing.assert_close(h, z * previous(h, first) + (1 - z) * n)
    torch.testing.assert_close(maps["encoder hidden"][1, :, 3], first_BLD[1])
    expected_BTD, _ = model.features_and_targets(*PAIR, PAIR[-1])
    torch.testing.assert_close(maps["decoder hidden"][:, -1], expected_BTD)
    read_BS = SOURCE_BS.gather(1, reversed_indices(LENGTHS_B, 7)) if reverse else SOURCE_BS
    assert torch.equal(activations[0].rows, read_BS)


def test_expert_gates_reproduce_the_features():
    model = build("experts")
    gates_BTE = weights_by_name(model, TOKENS_BT)["experts"][:, 0, 0]
    hidden_BTF = model.hidden(TOKENS_BT, None)
    outputs_BTEF = model.mixture.experts(hidden_BTF).unflatten(-1, (5, -1))
    mixed_BTF = (gates_BTE.unsqueeze(-1) * outputs_BTEF).sum(-2)
    features_BTF = F.rms_norm(mixed_BTF, mixed_BTF.shape[-1:])
    torch.testing.assert_close(features_BTF, model.features(TOKENS_BT))


def test_window_effect_is_that_of_a_single_token():
    """Token s alone in the window of token t, with zeros at all other positions."""
    for name in ("sigma-pi", "mlp"):
        model = build(name)
        effect_TS = weights_by_name(model, TOKENS_BT)["token contribution"][0, 0, 0]
        for t in range(12):
            for s in range(12):
                if not 0 <= t - s < model.window:
                    assert effect_TS[t, s] == 0
                    continue
                window_WD = torch.zeros(model.window, 8, dtype=torch.float64)
                window_WD[model.window - 1 - (t - s)] = model.embedding.weight[TOKENS_BT[0, s]]
                if name == "mlp":
                    first = model.layers.layers[0]
                    effect = first(window_WD.t().flatten()) - first.bias
                else:
                    factors = model.factors(window_WD).unflatten(-1, (model.window, -1))
                    effect = (
                        torch.stack([1 + factors[w, w] for w in range(model.window)]).prod(0) - 1
                    )
                torch.testing.assert_close(effect_TS[t, s], effect.norm())


def test_bigram_map_is_the_last_token():
    weights_BLHTS = weights_by_name(build("softmax"), TOKENS_BT)["last token"]
    assert torch.equal(weights_BLHTS[1, 0, 0], torch.eye(12))


TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token


def make_run(directory: Path, name: str, **config: str) -> Path:
    torch.manual_seed(0)
    model_args = {
        "vocab_size": TOKENIZER.vocab_size,
        "context_length": CONTEXT_LENGTH,
        **SMALL[name],
    }
    model = MODELS[name](**model_args)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    save_config(directory, name, model_args)
    save_tensors(directory / "model.safetensors", unique_state_dict(model))
    TOKENIZER.save(directory / "tokenizer.json")
    if config:
        (directory / "run.json").write_text(json.dumps({"format": 2, "config": config}))
    return directory


def test_xray_labels_tokens_layers_heads_and_scales(tmp_path, capsys):
    run, output = make_run(tmp_path, "gpt"), tmp_path / "of" / "xray.svg"
    Xray(run, "a $x$\n\té中", output=output)()
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["attention: 3 layers x 2 heads x 12 tokens x 12 tokens", str(output)]
    for text in (">attention<", ">1<", ">layer 3, head 2<", ">$<", ">·<", ">↵<", ">⇥<"):
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
            ["alignment", "backward encoder hidden", "decoder reset gate"],
        ),
    ],
)
def test_every_map_has_its_name_as_title(name, titles, tmp_path):
    Xray(make_run(tmp_path, name), "some text", output=tmp_path / "xray.svg")()
    for title in titles:
        assert f">{title}<" in (tmp_path / "xray.svg").read_text()


def test_gates_are_drawn_as_the_ten_units_that_vary_most_the_same_in_every_map(tmp_path):
    run, output = make_run(tmp_path, "lstm"), tmp_path / "xray.svg"
    model = MODELS["lstm"](TOKENIZER.vocab_size, CONTEXT_LENGTH, width=12, depth=2)
    with torch.no_grad():
        for cell in model.cells:  # units 3 and 7 see nothing, so they do not vary
            for weight in (cell.input.weight, cell.hidden.weight, cell.input.bias.unsqueeze(-1)):
                weight.unflatten(0, (4, 12))[:, [3, 7]] = 0.0
    arguments = {"vocab_size": TOKENIZER.vocab_size, "context_length": CONTEXT_LENGTH}
    save_config(run, "lstm", {**arguments, "width": 12, "depth": 2})
    save_tensors(run / "model.safetensors", unique_state_dict(model))
    Xray(run, "some text", output=output)()
    svg = output.read_text()
    drawn = [f">{unit}<" for unit in (1, 2, 3, 5, 6, 7, 9, 10, 11, 12)]
    maps, layers = 6, 2
    for label in drawn[1:]:
        assert svg.count(label) == maps * layers
    assert ">4<" not in svg
    assert ">8<" not in svg
    assert svg.count(">the 10 that vary most of 12 units<") == maps


def test_titles_fit_into_a_picture_narrower_than_they_are(tmp_path):
    from matplotlib.figure import Figure

    pictures = []

    def savefig(figure, *_, **__):
        pictures.append(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        run = make_run(tmp_path, "attention", task="translation", model="attention")
        for only in ("alignment", "backward encoder"):
            Xray(run, "a", translation="b", only=only, output=tmp_path / "xray.png")()
    for figure in pictures:
        canvas = figure.bbox
        boxes = [text.get_window_extent() for text in figure.texts]
        assert boxes
        for box in boxes:
            assert canvas.x0 <= box.x0 < box.x1 <= canvas.x1
        for left, right in itertools.pairwise(boxes):
            assert left.x1 < right.x0 or left.y0 > right.y1


def test_only_draws_matching_maps(tmp_path, capsys):
    output = tmp_path / "xray.svg"
    Xray(make_run(tmp_path, "attention"), "some text", only="decoder", output=output)()
    assert "alignment" not in output.read_text() + capsys.readouterr().out
    assert ">decoder hidden<" in output.read_text()


def test_image_size_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("training.plots.xray.MAX_PIXELS", 500)
    output = tmp_path / "xray.png"
    Xray(make_run(tmp_path, "softmax"), "x" * 60, output=output)()
    width, height = (int.from_bytes(output.read_bytes()[at : at + 4]) for at in (16, 20))
    assert 300 < width <= height <= 500


@pytest.mark.parametrize("name", ["attention", "gpt"])
def test_translation_run_draws_its_own_translation(name, tmp_path, capsys):
    run, output = make_run(tmp_path, name, task="translation", model=name), tmp_path / "xray.svg"
    Xray(run, "chat", output=output)()
    translation_svg = output.read_text()
    printed = capsys.readouterr().out.splitlines()[0]
    model = gpt.checkpoint.load_language_model(run)
    ids = TOKENIZER.encode("chat")
    [translation] = translate(
        model, [ids], decoder_start_token=EOS, eos_token=EOS, max_tokens=CONTEXT_LENGTH
    )
    assert printed == TOKENIZER.decode(translation).strip()
    make_run(tmp_path, name, task="text", model=name)
    Xray(run, "chat", output=output)()
    assert output.read_text() != translation_svg


def test_translation_option_sets_the_target(tmp_path, capsys):
    output = tmp_path / "xray.svg"
    Xray(make_run(tmp_path, "transformer"), "chat", translation="cat", output=output)()
    assert "cross-attention: 2 layers x 2 heads x 4 tokens x 4 tokens" in capsys.readouterr().out
    assert ">&lt;|endoftext|&gt;<" in output.read_text()


def test_xray_rejects_invalid_arguments(tmp_path):
    run, output = make_run(tmp_path, "gpt"), tmp_path / "xray.png"
    lstm = tmp_path / "lstm"
    lstm.mkdir()
    make_run(lstm, "lstm")
    linear = tmp_path / "linear"
    linear.mkdir()
    save_config(linear, "linear", {"inputs": 1})
    save_tensors(linear / "model.safetensors", unique_state_dict(gpt.CHAPTERS["linear"]()))
    for command, message in (
        (Xray(run, "", output=output), "TEXT is 0 tokens long: expected 1 to 1000"),
        (Xray(lstm, "x" * 1001, output=output), "TEXT is 1001 tokens long"),
        (Xray(run, "x" * 17, output=output), "17 tokens do not fit in the context of 16"),
        (Xray(run, "x", output=tmp_path / "x.gif"), "--output must end in .svg, .png or .pdf"),
        (Xray(lstm, "x", translation="y", output=output), "LSTM does not translate"),
        (Xray(linear, "x", output=output), "Linear is not a language model"),
        (Xray(tmp_path / "none", "x", output=output), "no such run directory"),
        (Xray(run, "x", only="gate", output=output), "no such name; there are attention"),
    ):
        with pytest.raises(ValueError, match=message):
            command()
    save_config(lstm, "lstm", {"vocab_size": 100, "context_length": 8, **SMALL["lstm"]})
    small = MODELS["lstm"](100, 8, **SMALL["lstm"])
    save_tensors(lstm / "model.safetensors", unique_state_dict(small))
    result = subprocess.run(
        [sys.executable, "-m", "training", "xray", lstm, "x", "--output", output],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "the model has 100 tokens and its tokenizer.json 257" in result.stderr
    assert not output.exists()

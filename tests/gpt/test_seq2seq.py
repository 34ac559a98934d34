"""Chapters 11 and 12: the recurrent encoder-decoder, without and with attention."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gpt.beam_search import translate
from gpt.models.encoder_decoder import EncoderDecoder
from gpt.models.recurrent import GRUCell
from gpt.models.seq2seq import AdditiveAttention, Seq2Seq, Seq2SeqAttention, reversed_indices

SOURCE_BS = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))
LENGTHS_B = torch.tensor([7, 1, 4, 6])


def pack(source_BSD: Tensor) -> nn.utils.rnn.PackedSequence:
    return pack_padded_sequence(source_BSD, LENGTHS_B, batch_first=True, enforce_sorted=False)


def copy_weights(cell: GRUCell, theirs: nn.GRU, suffix: str) -> None:
    """Copy our weights to torch's layer."""
    for kind, module in (("ih", cell.input), ("hh", cell.hidden)):
        getattr(theirs, f"weight_{kind}_{suffix}").data.copy_(module.weight)
        getattr(theirs, f"bias_{kind}_{suffix}").data.copy_(module.bias)


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def test_chapter_11_equals_torch_with_packed_sequences() -> None:
    model = randomize(Seq2Seq(20, 12, width=8, depth=2))
    theirs = nn.GRU(8, 8, num_layers=2, batch_first=True).double()
    for layer, cell in enumerate(model.encoder):
        copy_weights(cell, theirs, f"l{layer}")
    _, hidden_LBD = theirs(pack(model.embedding(SOURCE_BS)))
    hidden_BLD = model.encode(SOURCE_BS, LENGTHS_B)["hidden"]
    torch.testing.assert_close(hidden_BLD, hidden_LBD.transpose(0, 1))
    for layer, cell in enumerate(model.decoder):
        copy_weights(cell, theirs, f"l{layer}")
    expected_BTD, _ = theirs(model.embedding(SOURCE_BS), hidden_LBD)
    features_BTD = model.features(SOURCE_BS, model.encode_source(SOURCE_BS, LENGTHS_B))
    torch.testing.assert_close(features_BTD, expected_BTD)


def test_chapter_11_reverse_encodes_the_reversed_source() -> None:
    model = randomize(Seq2Seq(20, 12, width=8))
    reversed_BS = SOURCE_BS.gather(1, reversed_indices(LENGTHS_B, 7))
    assert reversed_BS[2, :4].tolist() == SOURCE_BS[2, :4].flip(0).tolist()
    expected = model.encode(reversed_BS, LENGTHS_B)["hidden"]
    model.reverse = True
    torch.testing.assert_close(model.encode(SOURCE_BS, LENGTHS_B)["hidden"], expected)


def test_chapter_11_state_size_does_not_depend_on_the_source_length() -> None:
    model = Seq2Seq(20, 12, width=8, depth=2)
    for length in (1, 12, 100):
        source_BS = torch.zeros(1, length, dtype=torch.long)
        state = model.encode_source(source_BS, torch.tensor([length]))
        assert {name: tensor.shape for name, tensor in state.items()} == {"hidden": (1, 2, 8)}


def test_chapter_12_weights_of_known_scores() -> None:
    attention = AdditiveAttention(1, 1)
    nn.init.zeros_(attention.query.weight)
    nn.init.zeros_(attention.query.bias)
    nn.init.ones_(attention.score)
    keys_BSD = torch.tensor([0.31, 0.85, 0.24]).atanh().view(1, 3, 1)
    padding_BS = torch.zeros(1, 3, dtype=torch.bool)
    weights_BS = attention(torch.zeros(1, 1), keys_BSD, padding_BS)
    assert [round(weight, 2) for weight in weights_BS[0].tolist()] == [0.27, 0.47, 0.26]


def test_chapter_12_weights_sum_to_one_and_are_zero_on_padding() -> None:
    model = randomize(Seq2SeqAttention(20, 12, width=8))
    tokens_BT = SOURCE_BS[:, :5]
    alignment = model.xray(SOURCE_BS, LENGTHS_B, tokens_BT)[0]
    assert alignment.name == "alignment"
    weights_BTS = alignment.weights[:, 0, 0]
    assert weights_BTS.shape == (4, 5, 7)
    torch.testing.assert_close(weights_BTS.sum(dim=-1), torch.ones(4, 5, dtype=torch.float64))
    padding_BTS = (torch.arange(7) >= LENGTHS_B.unsqueeze(1)).unsqueeze(1).expand(4, 5, 7)
    assert (weights_BTS[padding_BTS] == 0).all()
    assert (weights_BTS[~padding_BTS] > 0).all()


def test_chapter_12_encoder_equals_torchs_bidirectional_gru() -> None:
    model = randomize(Seq2SeqAttention(20, 12, width=8))
    theirs = nn.GRU(8, 8, batch_first=True, bidirectional=True).double()
    copy_weights(model.forward_encoder, theirs, "l0")
    copy_weights(model.backward_encoder, theirs, "l0_reverse")
    packed, hidden_2BD = theirs(pack(model.embedding(SOURCE_BS)))
    memory_BSD, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    encoded = model.encode(SOURCE_BS, LENGTHS_B)
    torch.testing.assert_close(encoded["memory"], memory_BSD)
    torch.testing.assert_close(encoded["hidden"], torch.tanh(model.bridge(hidden_2BD[1])))


def test_chapter_12_decoder_equals_its_equations() -> None:
    model = randomize(Seq2SeqAttention(20, 12, width=8))
    encoded = model.encode(SOURCE_BS[2:3, :4], torch.tensor([4]))
    cell = nn.GRUCell(8 + 16, 8).double()
    cell.weight_ih.data.copy_(torch.cat([model.decoder.input.weight, model.context.weight], dim=1))
    cell.bias_ih.data.copy_(model.decoder.input.bias)
    cell.weight_hh.data.copy_(model.decoder.hidden.weight)
    cell.bias_hh.data.copy_(model.decoder.hidden.bias)
    attention = model.attention
    hidden_D, words = encoded["hidden"][0], [3, 11, 0]
    expected = []
    for word in words:
        scores = torch.stack(
            [
                attention.score @ torch.tanh(attention.query(hidden_D) + attention.key(memory_D))
                for memory_D in encoded["memory"][0]
            ]
        )
        context_D = sum(w * m for w, m in zip(scores.softmax(0), encoded["memory"][0], strict=True))
        word_D = model.embedding.weight[word]
        hidden_D = cell(torch.cat([word_D, context_D]), hidden_D)
        expected.append(torch.tanh(model.readout(torch.cat([hidden_D, context_D, word_D]))))
    features_BTD = model.decode(torch.tensor([words]), encoded)
    torch.testing.assert_close(features_BTD[0], torch.stack(expected))


def test_an_empty_source_in_a_batch_gives_finite_gradients_and_the_unconditional_features() -> None:
    for model in (Seq2Seq(20, 12, width=8), Seq2SeqAttention(20, 12, width=8)):
        randomize(model)
        tokens_BT = SOURCE_BS[:, :5]
        lengths_B = torch.tensor([7, 0, 4, 6])
        features_BTD = model.features(tokens_BT, model.encode_source(SOURCE_BS, lengths_B))
        torch.testing.assert_close(features_BTD[1], model.features(tokens_BT)[1])
        loss = model.loss(SOURCE_BS, lengths_B, tokens_BT, tokens_BT)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def digits(batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences of 4 to 10 digits and their reverse; 10 is the start token, 11 the EOS token."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(4, 11, (batch_size,), generator=generator)
    source_BS = torch.randint(10, (batch_size, 10), generator=generator)
    positions_T = torch.arange(11)
    reversed_BT = source_BS.gather(1, reversed_indices(lengths_B, 10))
    targets_BT = nn.functional.pad(reversed_BT, (0, 1))
    targets_BT = torch.where(positions_T == lengths_B.unsqueeze(1), 11, targets_BT)
    targets_BT = torch.where(positions_T > lengths_B.unsqueeze(1), -100, targets_BT)
    tokens_BT = nn.functional.pad(reversed_BT, (1, 0), value=10)
    return source_BS, lengths_B, tokens_BT, targets_BT


def train(model: EncoderDecoder, steps: int, rate: float) -> float:
    """Train a model; return the share of unseen sequences that it reverses without error."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(*digits(64, step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    source_BS, lengths_B, *_ = digits(100, 10**6)
    sources = [
        row[:length] for row, length in zip(source_BS.tolist(), lengths_B.tolist(), strict=True)
    ]
    translations = translate(
        model.eval(), sources, decoder_start_token=10, eos_token=11, max_tokens=12
    )
    return sum(w == s[::-1] for w, s in zip(translations, sources, strict=True)) / len(sources)


def test_chapter_12_attention_beats_a_fixed_context_vector() -> None:
    torch.manual_seed(0)
    with_attention = train(Seq2SeqAttention(12, 12, width=48), 150, 1e-2)
    without = train(Seq2Seq(12, 12, width=48, depth=1), 150, 1e-2)
    assert with_attention > 0.8 > 0.5 > without


def test_invalid_sizes_raise() -> None:
    with pytest.raises(ValueError, match="width and depth must be at least 1, not 8 and 0"):
        Seq2Seq(20, 12, width=8, depth=0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Seq2SeqAttention(20, 12, width=0)

"""Chapter 13: attention and the encoder-decoder transformer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.attention import (
    CausalSelfAttention,
    Positions,
    attention_weights,
    chunked_causal_attention,
    init_cache,
    source_mask,
)
from gpt.models.transformer import Attention, Transformer, sinusoids


def build(**kwargs: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(30, 12, **{"width": 16, "depth": 2, "heads": 2, **kwargs}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model


def causal_mask(length: int) -> Tensor:
    """The mask of attention with a KV cache."""
    state = init_cache(torch.zeros(1, 8), (1, 1, 2, length, 4), None)
    return Positions(torch.zeros(1, length, dtype=torch.long), state).mask_B1TS


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_chapter_13_attention_weights_agree_with_fused_attention() -> None:
    queries, keys, values = random(3, 2, 4, 6, 8)
    for mask, causal in ((None, False), (causal_mask(6), True)):
        expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        torch.testing.assert_close(attention_weights(queries, keys, mask) @ values, expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 4, 11])
def test_chunked_attention_and_its_gradients_equal_fused_attention(
    length: int, kv_heads: int
) -> None:
    tensors = [random(2, heads, length, 8).requires_grad_() for heads in (4, kv_heads, kv_heads)]
    outputs = [
        F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True),
        chunked_causal_attention(*tensors, chunk=4),
    ]
    torch.testing.assert_close(outputs[1], outputs[0])
    weights = torch.arange(outputs[0].numel()).double().view_as(outputs[0])
    expected, actual = (torch.autograd.grad((it * weights).sum(), tensors) for it in outputs)
    torch.testing.assert_close(actual, expected)


def test_chapter_13_mask_gives_exact_zeros_and_equal_scores_equal_weights() -> None:
    weights_TS = attention_weights(random(1, 1, 7, 4), random(1, 1, 7, 4), causal_mask(7))[0, 0]
    assert (weights_TS.triu(1) == 0).all()
    assert (weights_TS.tril()[weights_TS.new_ones(7, 7).tril() > 0] > 0).all()
    torch.testing.assert_close(weights_TS.sum(dim=-1), weights_TS.new_ones(7))
    equal_TS = attention_weights(
        torch.zeros(1, 1, 3, 4), random(1, 1, 3, 4).float(), causal_mask(3)
    )[0, 0]
    expected_TS = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(equal_TS, expected_TS)


def test_chapter_13_attention_is_asymmetric() -> None:
    """The weight of "bread" for "eat" differs from that of "eat" for "bread"."""
    attention = Attention(8, 1).double()
    x_BTD = random(1, 3, 8)
    weights_TS = attention_weights(
        attention.split_heads(attention.query(x_BTD)), attention.split_heads(attention.key(x_BTD))
    )[0, 0]
    assert not torch.allclose(weights_TS, weights_TS.T, atol=1e-3)


def test_chapter_13_without_positions_order_does_not_matter() -> None:
    model = build()
    sentence, lengths = torch.tensor([[5, 17, 9]]), torch.tensor([3])
    order = [2, 1, 0]

    def encode(source_BS: Tensor) -> Tensor:
        return model.encode(source_BS, lengths)["source_values"]

    encoded, reordered = encode(sentence)[..., order, :], encode(sentence[:, order])
    assert not torch.allclose(reordered, encoded, atol=1e-3)
    model.positions_SD.zero_()
    encoded, reordered = encode(sentence)[..., order, :], encode(sentence[:, order])
    torch.testing.assert_close(reordered, encoded)
    target = torch.tensor([[3, 4]])
    torch.testing.assert_close(
        model.features(target, model.encode_source(sentence, lengths)),
        model.features(target, model.encode_source(sentence[:, order], lengths)),
    )


def test_chapter_13_no_gradient_flows_from_the_future() -> None:
    model = build()
    tokens_BT = torch.arange(10).unsqueeze(0)
    encoded = model.encode(torch.tensor([[20, 21, 22]]), torch.tensor([2]))
    model.decode(tokens_BT, encoded)[0, 4].square().sum().backward()
    gradient_V = model.embedding.weight.grad.norm(dim=-1)
    assert (gradient_V[:5] > 1e-6).all()
    assert (gradient_V[5:10] == 0).all()
    # Gradients flow to all source tokens but not to padding.
    assert (gradient_V[20:22] > 1e-6).all()
    assert gradient_V[22] == 0


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_chapter_13_equals_torch_layers_weight_for_weight(norm_first: bool) -> None:
    model = build(norm_first=norm_first)
    settings: dict[str, Any] = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True}
    settings["norm_first"] = norm_first
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, **settings), 2, nn.LayerNorm(16), False
    ).double()
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(16, 2, **settings), 2, nn.LayerNorm(16)
    ).double()
    ours = model.state_dict()

    def load(theirs: nn.Module, stack: str, norm: str, names: dict[str, str]) -> None:
        state = {}
        for kind in ("weight", "bias"):
            state[f"norm.{kind}"] = ours[f"{norm}.{kind}"]
            for layer in range(2):
                for name, their_name in names.items():
                    state[f"layers.{layer}.{their_name}.{kind}"] = ours[
                        f"{stack}.{layer}.{name}.{kind}"
                    ]
                for name, their_name in (("attention", "self_attn"), ("cross", "multihead_attn")):
                    if f"{stack}.{layer}.{name}.query.weight" not in ours:
                        continue
                    state[f"layers.{layer}.{their_name}.in_proj_{kind}"] = torch.cat(
                        [
                            ours[f"{stack}.{layer}.{name}.{matrix}.{kind}"]
                            for matrix in ("query", "key", "value")
                        ]
                    )
                    state[f"layers.{layer}.{their_name}.out_proj.{kind}"] = ours[
                        f"{stack}.{layer}.{name}.output.{kind}"
                    ]
        theirs.load_state_dict(state)

    shared = {"attention_norm": "norm1", "mlp.up": "linear1", "mlp.down": "linear2"}
    load(encoder, "encoder", "encoder_norm", {**shared, "mlp_norm": "norm2"})
    load(decoder, "decoder", "norm", {**shared, "cross_norm": "norm2", "mlp_norm": "norm3"})
    generator = torch.Generator().manual_seed(2)
    source_BS = torch.randint(30, (3, 7), generator=generator)
    tokens_BT = torch.randint(30, (3, 5), generator=generator)
    lengths_B = torch.tensor([7, 2, 4])
    padding_BS = ~source_mask(lengths_B, 7)
    future_TT = torch.ones(5, 5, dtype=torch.bool).triu(1)
    memory_BSD = encoder(
        model.embedding(source_BS) + model.positions_SD[:7], src_key_padding_mask=padding_BS
    )
    expected_BTD = decoder(
        model.embedding(tokens_BT) + model.positions_SD[:5],
        memory_BSD,
        tgt_mask=future_TT,
        memory_key_padding_mask=padding_BS,
    )
    encoded = model.encode(source_BS, lengths_B)
    torch.testing.assert_close(model.decode(tokens_BT, encoded), expected_BTD)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_xray_shows_the_weights_that_the_forward_pass_uses(norm_first: bool) -> None:
    """The values of the last layer's cross-attention, averaged by its map, are its output."""
    model = build(norm_first=norm_first, depth=1)
    source_BS, lengths_B = torch.tensor([[5, 17, 9]]), torch.tensor([3])
    tokens_BT = torch.tensor([[3, 4]])
    outputs = []
    block = model.decoder[0]
    block.cross.output.register_forward_hook(lambda module, args, out: outputs.append(args[0]))
    encoded = model.encode(source_BS, lengths_B)
    model.decode(tokens_BT, encoded)
    weights_BHTS = model.xray(source_BS, lengths_B, tokens_BT)[2].weights[:, 0]
    averages_BHTK = weights_BHTS @ encoded["source_values"][:, 0]
    torch.testing.assert_close(outputs[0], averages_BHTK.transpose(1, 2).flatten(2))


def test_chapter_13_positions_equal_the_papers_formula() -> None:
    table_SD = sinusoids(40, 6)
    for position, pair in ((0, 0), (1, 0), (7, 1), (39, 2)):
        angle = torch.tensor(position / 10_000 ** (2 * pair / 6))
        expected = torch.stack([angle.sin(), angle.cos()])
        torch.testing.assert_close(table_SD[position, 2 * pair : 2 * pair + 2], expected)
    assert sinusoids(5, 7).shape == (5, 7)


def test_an_empty_source_in_a_batch_gives_the_unconditional_features() -> None:
    model = build()
    source_BS, lengths_B = torch.tensor([[4, 5, 6], [7, 8, 9]]), torch.tensor([3, 0])
    tokens_BT = torch.tensor([[1, 2], [1, 2]])
    features_BTD = model.features(tokens_BT, model.encode_source(source_BS, lengths_B))
    torch.testing.assert_close(features_BTD[1], model.features(tokens_BT)[1])
    assert not torch.allclose(features_BTD[0], features_BTD[1], atol=1e-3)


def test_causal_attention_with_the_cache_mask_equals_it_without() -> None:
    attention = CausalSelfAttention(8, 2).double()
    x_BTD = random(2, 5, 8)
    expected_BTD = attention(x_BTD, Positions(torch.zeros(2, 5), None))
    queries_BHTK, keys_BHSK = attention.queries_and_keys(x_BTD, Positions(torch.zeros(2, 5), None))
    weights_BHTS = attention_weights(queries_BHTK, keys_BHSK, causal_mask(5))
    mixed_BHTK = weights_BHTS @ attention.split_heads(attention.value(x_BTD))
    output_BTD = attention.output(mixed_BHTK.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output_BTD, expected_BTD)


def test_invalid_sizes_raise() -> None:
    with pytest.raises(ValueError, match=r"multiple of heads.*50 with 3"):
        Transformer(30, 8, width=50, heads=3)
    with pytest.raises(ValueError, match=r"at least 1.*32, 0, 2 and 0"):
        Transformer(30, 8, width=32, depth=0, heads=2)
    with pytest.raises(ValueError, match="9 tokens do not fit in the context of 8"):
        Transformer(30, 8).encode_source(torch.zeros(1, 9, dtype=torch.long), torch.tensor([9]))


def test_flops_count_each_token_in_one_of_the_two_networks() -> None:
    model = Transformer(1000, 64, width=48, depth=2, heads=3)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) - 1000 * 48
    # Over a window of 64: two self-attentions and one cross-attention of 32 by 32, forward
    # and twice backward, scores and averages, two operations each.
    attention = 2 * 3 * (32 * 32 * 48) * 2 * 2 * 3 / 64
    assert model.flops_per_token(64) == 3 * matrices + attention

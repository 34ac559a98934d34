"""GPT-2 and GPT against `transformers` and torch."""

import pytest
import torch
from torch import nn

from benchmarks.backends import to_transformers
from gpt import interchange
from gpt.models.attention import Positions, RMSNorm, rotary_table, rotate
from gpt.models.gpt import GPT, GPT2, NGrams


@pytest.mark.parametrize("sizes", [{}, {"tied": True}, {"kv_heads": 1, "head_width": 20}])
def test_chapter_15_equals_transformers_qwen3_weight_for_weight(sizes: dict[str, int]) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = GPT(97, 32, width=48, depth=2, heads=3, hidden=80, **sizes).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    config, tensors = interchange.to_transformers(model)
    theirs = Qwen3ForCausalLM(Qwen3Config(**config)).double().eval()
    if "tied" in sizes:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    theirs.load_state_dict(tensors)
    tokens_BT = torch.randint(97, (2, 32))
    with torch.inference_mode():
        # Their rotary table is float32 whatever the model is.
        torch.testing.assert_close(model(tokens_BT), theirs(tokens_BT).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_chapter_14_equals_transformers_gpt2_weight_for_weight(training: bool, bias: bool) -> None:
    torch.manual_seed(0)
    dropout = 0.3 if training else 0.0
    model = GPT2(97, 32, width=48, depth=2, heads=3, dropout=dropout, bias=bias)
    model = model.double().train(training)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    theirs = to_transformers(model, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    tokens_BT = torch.randint(97, (2, 32))

    def output(model):
        torch.manual_seed(1)  # the same dropout masks in the same order
        with torch.no_grad():
            return model(tokens_BT)

    torch.testing.assert_close(output(model), output(theirs).logits, rtol=1e-9, atol=1e-9)


def test_chapter_14_initial_weights_are_those_of_openai() -> None:
    torch.manual_seed(0)
    model = GPT2(500, 64, width=128, depth=8, heads=4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == float("norm" in name and "weight" in name)).all()
        else:
            residual = name.endswith(("output.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.005 if residual else 0.02, rel=0.05)
    assert model.unembedding.weight is model.embedding.weight
    tokens_BT = torch.randint(500, (2, 64))
    assert model.loss(tokens_BT, tokens_BT.roll(1)).item() == pytest.approx(6.21, abs=0.05)


@pytest.mark.parametrize("model_class", [GPT, GPT2])
def test_chapter_14_no_gradient_flows_from_the_future(model_class: type[GPT | GPT2]) -> None:
    torch.manual_seed(0)
    model = model_class(20, 10, width=16, depth=2, heads=2).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    # Ten different tokens, so that the gradient of an embedding is that of its position.
    model.features(torch.arange(10).unsqueeze(0))[0, 4].square().sum().backward()
    gradient_T = model.embedding.weight.grad[:10].norm(dim=-1)
    assert (gradient_T[5:] == 0).all()
    assert (gradient_T[:5] > 1e-6).all()


def test_chapter_14_only_the_target_of_a_concatenated_pair_is_scored() -> None:
    torch.manual_seed(0)
    model = GPT2(50, 24, width=32, depth=2, heads=2).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    source_BS, target_BT = torch.randint(50, (3, 9)), torch.randint(50, (3, 7))
    lengths_B = torch.tensor([9, 2, 5])
    nll_BT = model.nll(source_BS, lengths_B, target_BT[:, :-1], target_BT[:, 1:])
    for row, length in enumerate(lengths_B.tolist()):
        text_BT = torch.cat([source_BS[row, :length], target_BT[row]]).unsqueeze(0)
        expected = model.nll(text_BT[:, :-1], text_BT[:, 1:])[0, length:]
        torch.testing.assert_close(nll_BT[row], expected, rtol=0, atol=1e-12)


def test_rotary_scores_depend_only_on_distance() -> None:
    cos_SK, sin_SK = (table.double() for table in rotary_table(64, 16, 10_000.0))
    query, key = torch.randn(
        2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def score(i: int, j: int) -> float:
        rotated_query = rotate(query, cos_SK[i : i + 1], sin_SK[i : i + 1])
        rotated_key = rotate(key, cos_SK[j : j + 1], sin_SK[j : j + 1])
        return (rotated_query * rotated_key).sum().item()

    assert score(5, 2) == pytest.approx(score(40, 37), rel=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-2)


def test_rms_norm_in_bfloat16_is_accurate_to_its_rounding() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 3
    norm = RMSNorm(32)
    y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x), rtol=2**-6, atol=0)


def test_ngrams_look_up_the_last_two_and_three_tokens() -> None:
    torch.manual_seed(0)
    ngrams = NGrams(vocab_size=7, table_size=100, width=4)
    assert len(ngrams.bigrams.weight) == 49  # all that exist
    assert len(ngrams.trigrams.weight) == 100
    tokens = [3, 0, 6, 6, 1]
    tokens_BT = torch.tensor([tokens])
    x_BTD = ngrams(tokens_BT, Positions(tokens_BT, None))
    for position in range(5):
        a, b, c = [0, 0, *tokens][position : position + 3]
        bigram = ngrams.bigrams.weight[b * 7 + c]
        trigram = ngrams.trigrams.weight[(a * 49 + b * 7 + c) % 100]
        torch.testing.assert_close(x_BTD[0, position], bigram + trigram)


def test_flops_equal_the_published_formula() -> None:
    """6 N + 12 L H Q T (Chowdhery et al. 2022), N without the embedding, which is a lookup."""
    model = GPT(1000, 64, width=48, depth=2, heads=3)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) - 1000 * 48
    assert model.flops_per_token(64) == 6 * matrices + 12 * 2 * 3 * 16 * 64
    tied = GPT(1000, 64, width=48, depth=2, heads=3, tied=True)
    assert tied.flops_per_token(64) == model.flops_per_token(64)


def test_a_width_not_divisible_by_heads_raises() -> None:
    with pytest.raises(ValueError, match=r"multiple of 2 \* heads.*50 with 3"):
        GPT(100, 16, width=50, heads=3)


def test_invalid_sizes_raise() -> None:
    with pytest.raises(ValueError, match="ngrams must be at least 0, not -1"):
        GPT(100, 16, ngrams=-1)
    with pytest.raises(ValueError, match=r"multiple of heads.*50 with 3"):
        GPT2(100, 16, width=50, heads=3)
    with pytest.raises(ValueError, match=r"at least 1.*32, 0, 2 and 0"):
        GPT2(100, 16, width=32, depth=0, heads=2)
    with pytest.raises(ValueError, match="17 tokens do not fit in the context of 16"):
        GPT2(100, 16)(torch.zeros(1, 17, dtype=torch.long))

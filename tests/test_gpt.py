"""Today's GPT against an implementation that we did not write."""

import pytest
import torch
from torch import nn

from gpt import GPT
from gpt.attention import rotary_table, rotate


@pytest.mark.parametrize("tied", [False, True])
def test_equals_qwen3_weight_for_weight(tied: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = GPT(97, 32, width=48, depth=2, heads=3, hidden=80, tied=tied).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
    )
    theirs = Qwen3ForCausalLM(config).double().eval()
    names = {
        "embedding": "model.embed_tokens",
        "unembedding": "lm_head",
        "norm": "model.norm",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
        "query_norm": "q_norm",
        "key_norm": "k_norm",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
        "attention": "self_attn",
        "blocks": "model.layers",
    }
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in model.state_dict().items()
    }
    theirs.load_state_dict(state)
    tokens_BT = torch.randint(97, (2, 32))
    with torch.inference_mode():
        # Their rotary table is float32 whatever the model is.
        torch.testing.assert_close(model(tokens_BT), theirs(tokens_BT).logits, rtol=1e-4, atol=1e-5)


def test_rotary_scores_depend_only_on_the_distance() -> None:
    cos_SK, sin_SK = (table.double() for table in rotary_table(64, 16, 10_000.0))
    query, key = torch.randn(
        2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def score(i: int, j: int) -> float:
        turned = [
            rotate(x, cos_SK[k : k + 1], sin_SK[k : k + 1]) for x, k in ((query, i), (key, j))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(5, 2) == pytest.approx(score(40, 37), rel=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-2)


def test_flops_follow_the_published_count() -> None:
    """6 N + 12 L H Q T (Chowdhery et al. 2022), N without the embedding that is only looked up."""
    model = GPT(1000, 64, width=48, depth=2, heads=3)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) - 1000 * 48
    assert model.flops_per_token(64) == 6 * matrices + 12 * 2 * 3 * 16 * 64
    tied = GPT(1000, 64, width=48, depth=2, heads=3, tied=True)
    assert tied.flops_per_token(64) == model.flops_per_token(64)


def test_a_width_that_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 2 \* heads.*50 with 3"):
        GPT(100, 16, width=50, heads=3)

"""Models for benchmarks only: GPT-2 from `transformers`, and GPT with one component changed."""

from typing import Any, cast

from torch import Tensor, nn

from gpt import LanguageModel, State
from gpt.checkpoint import MODEL_CLASSES
from gpt.models.attention import RotarySelfAttention
from gpt.models.gpt import GPT, Block, SwiGLU
from gpt.models.transformer import FeedForward


class TransformersGPT2(LanguageModel):
    """GPT-2 from `transformers` behind the LanguageModel interface, for training and scoring."""

    def __init__(
        self, vocab_size: int, context_length: int, *, width: int, depth: int, heads: int
    ) -> None:
        super().__init__(vocab_size, context_length)
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=context_length,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.model: Any = GPT2LMHeadModel(config)

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        assert state is None
        return self.model.transformer(tokens_BT).last_hidden_state

    def logits(self, features_BTD: Tensor) -> Tensor:
        return self.model.lm_head(features_BTD)


class SquaredReLU(nn.Module):
    """relu(x)^2 (So et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


ABLATIONS = {
    "rotary positions": "no rotary positions",
    "QK-norm": "no QK-norm",
    "zero initialization": "no zero initialization",
    "SwiGLU": "ReLU² instead of SwiGLU",
}
"""Components of GPT, and what a model without them is called in a table."""


class AblatedGPT(GPT):
    """GPT without one of the components in `ABLATIONS`. ReLU² has as many weights as SwiGLU."""

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int,
        depth: int,
        heads: int,
        ngrams: int,
        without: str,
    ) -> None:
        super().__init__(
            vocab_size, context_length, width=width, depth=depth, heads=heads, ngrams=ngrams
        )
        blocks = [cast(Block, block) for block in self.blocks]
        if without == "rotary positions":
            self.cos_SK.fill_(1.0)
            self.sin_SK.zero_()
        for block in blocks:
            attention = cast(RotarySelfAttention, block.attention)
            if without == "QK-norm":
                attention.query_norm = attention.key_norm = nn.Identity()  # type: ignore[assignment]
            if without == "SwiGLU":
                gated = cast(SwiGLU, block.mlp)
                hidden = gated.gate.out_features * 3 // 2
                block.mlp = FeedForward(width, hidden, SquaredReLU(), bias=False)
                nn.init.normal_(block.mlp.up.weight, std=width**-0.5)
                nn.init.zeros_(block.mlp.down.weight)
            if without == "zero initialization":
                for matrix in (attention.output, block.mlp.down):
                    nn.init.normal_(matrix.weight, std=(2 * depth * matrix.in_features) ** -0.5)


MODEL_CLASSES["transformers"] = TransformersGPT2
MODEL_CLASSES["gpt-ablated"] = AblatedGPT

"""Models that only benchmarks train: another library's, and today's GPT with a part taken out."""

from typing import Any, cast

from torch import Tensor, nn

from gpt import LanguageModel, State
from gpt.checkpoint import MODEL_CLASSES
from gpt.models.attention import RotarySelfAttention
from gpt.models.gpt import GPT, Block


class TransformersGPT2(LanguageModel):
    """`transformers`' own GPT-2 behind our interface, as far as training and scoring go."""

    def __init__(
        self, vocabulary: int, context: int, *, width: int, depth: int, heads: int
    ) -> None:
        super().__init__(vocabulary, context)
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
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


WITHOUT = ("rotary positions", "norm of queries and keys", "zeros at first")


class GPTWithout(GPT):
    """Today's GPT, one of the parts in `WITHOUT` taken out."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int,
        depth: int,
        heads: int,
        ngrams: int,
        without: str,
    ) -> None:
        super().__init__(vocabulary, context, width=width, depth=depth, heads=heads, ngrams=ngrams)
        blocks = [cast(Block, block) for block in self.blocks]
        if without == "rotary positions":
            self.cos_SK.fill_(1.0)
            self.sin_SK.zero_()
        for block in blocks:
            attention = cast(RotarySelfAttention, block.attention)
            if without == "norm of queries and keys":
                attention.query_norm = attention.key_norm = nn.Identity()  # type: ignore[assignment]
            if without == "zeros at first":
                for matrix in (attention.output, block.mlp.down):
                    nn.init.normal_(matrix.weight, std=(2 * depth * matrix.in_features) ** -0.5)


MODEL_CLASSES["transformers"] = TransformersGPT2
MODEL_CLASSES["gpt-without"] = GPTWithout

"""Chapter 13: attention without recurrence."""

import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.attention import CausalSelfAttention, KVCache, Positions, attention_weights
from gpt.models.transformer import Attention, EncoderBlock, FeedForward, Transformer, sinusoids
from training.chapters.encoder_decoder import SENTENCES, matches_by_length
from training.chapters.toy_translation import (
    attention_over_source,
    attention_panel,
    train,
    translate_sentences,
)
from training.plots.panels import BLUE, GREY, ORANGE, Heatmap, LinePlot, Panel, Series

WORDS = "I", "eat", "bread"
SCORES = torch.tensor([0.1, 0.8, 0.6])
"""How well the query of "eat" matches the keys of "I", "eat" and "bread"."""
HEAD_WIDTHS = 4, 16, 64, 256, 1024
SYMBOLS, RANDOM_LENGTH = 16, 28
"""The alphabet and the length of the random texts."""
CROSS = "My sister does not see these small black cats"


MASKED_SCORES = torch.tensor([[0.6, 0.0, 0.0], [0.4, 0.4, 0.0], [0.3, 0.3, 0.4]])
"""Scores of "J'aime les chats", those of later words still to be masked."""


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def random_vectors(*shape: int) -> Tensor:
    """Return standard normal numbers in float64, the same at every call."""
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def initialized(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a module with Xavier-uniform matrices, as in the paper's code, and biases of 0."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = build().double()
        for parameter in module.parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
        return module


@functools.cache
def trained_transformer() -> Transformer:
    """Return a translator without recurrence."""
    return train(lambda *sizes: Transformer(*sizes, width=64, depth=1, heads=2), 500, 0.005)


@functools.cache
def score_statistics() -> dict[int, tuple[float, float, float, float]]:
    """Return the variance of scores and the entropy of weights without and with sqrt(d), by d.

    Queries and keys of d random numbers; each query is compared with 16 keys.
    """
    statistics = {}
    for width in HEAD_WIDTHS:
        queries_BHTK, keys_BHSK = random_vectors(2, 1, 1, 1024, width)
        keys_BHSK = keys_BHSK[:, :, :16]
        scores = queries_BHTK @ keys_BHSK.mT
        unscaled, scaled = (
            torch.distributions.Categorical(weights).entropy().mean().item()
            for weights in (
                attention_weights(queries_BHTK * width**0.5, keys_BHSK),
                attention_weights(queries_BHTK, keys_BHSK),
            )
        )
        variance = scores.var().item()
        statistics[width] = variance, unscaled, variance / width, scaled
    return statistics


def asymmetry() -> tuple[float, float, float, float]:
    """Return the scores of eat for bread and of bread for eat: one matrix for both roles, then two."""
    words_BTD = random_vectors(1, 2, 8)
    attention = initialized(lambda: Attention(8, 1))
    assert isinstance(attention, Attention)
    keys_TD = attention.key(words_BTD)[0]
    shared_TT, separate_TT = keys_TD @ keys_TD.T, attention.query(words_BTD)[0] @ keys_TD.T
    return tuple(
        (scores_TT[row, 1 - row] / 8**0.5).item()
        for scores_TT in (shared_TT, separate_TT)
        for row in (0, 1)
    )


def order_difference(positions: bool) -> float:
    """Return by how much a word's encoded vector differs between a sentence and its reverse, at most."""
    model = initialized(lambda: Transformer(3, 3, width=16, depth=2, heads=2))
    assert isinstance(model, Transformer)
    if not positions:
        model.positions_SD.zero_()
    sentence_BS = torch.tensor([[0, 1, 2]])
    values = [
        model.encode(source_BS, torch.tensor([3]))["source_values"]
        for source_BS in (sentence_BS, sentence_BS.flip(1))
    ]
    return (values[0] - values[1].flip(-2)).abs().max().item()


def future_gradients() -> list[float]:
    """Return the gradient of what the second of four words becomes, by each of the words."""
    attention = initialized(lambda: CausalSelfAttention(8, 2))
    words_BTD = random_vectors(1, 4, 8).requires_grad_()
    attention(words_BTD, Positions(torch.zeros(1, 4), None))[0, 1].sum().backward()
    assert words_BTD.grad is not None
    return words_BTD.grad.norm(dim=-1)[0].tolist()


def masked_weights() -> Tensor:
    """Return weights_TT of `MASKED_SCORES`: minus infinity above the diagonal, then softmax."""
    earlier_TT = torch.ones_like(MASKED_SCORES, dtype=torch.bool).tril()
    return MASKED_SCORES.masked_fill(~earlier_TT, -torch.inf).softmax(-1)


def two_layers_as_one(feed_forward: bool) -> float:
    """Return by how much two averages in a row differ from one of the products of their matrices, at most.

    Optionally a feed-forward layer stands between the two.
    """
    x_TD, values_2DD = random_vectors(4, 8), random_vectors(2, 8, 8) / 8**0.5
    first_TT, second_TT = random_vectors(2, 4, 4).softmax(-1)
    mlp = initialized(lambda: FeedForward(8, 32, nn.ReLU())) if feed_forward else nn.Identity()
    two_TD = second_TT @ mlp(first_TT @ x_TD @ values_2DD[0]) @ values_2DD[1]
    one_TD = (second_TT @ first_TT) @ x_TD @ (values_2DD[0] @ values_2DD[1])
    return (two_TD - one_TD).abs().max().item()


class UnmaskedSelfAttention(CausalSelfAttention):
    """Self-attention that also sees what it is to predict."""

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None = None) -> Tensor:  # noqa: ARG002
        """x_BTD -> x_BTD."""
        queries_BHTK, keys_BHSK = self.queries_and_keys(x_BTD, positions)
        everything_TT = torch.ones(2 * x_BTD.shape[1:2], dtype=torch.bool)
        return self.attend(
            queries_BHTK, keys_BHSK, self.split_heads(self.value(x_BTD)), everything_TT
        )


@functools.cache
def loss_on_random_text(masked: bool) -> float:
    """Return the loss of a decoder on random symbols, after training on others of them."""
    random, steps, rate = seeded(), 200, 0.01
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Transformer(SYMBOLS + 1, RANDOM_LENGTH, width=32, depth=1, heads=1)
        if not masked:
            model.decoder[0].attention = UnmaskedSelfAttention(32, 1)
    model = model.double()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        targets_BT = torch.randint(1, SYMBOLS + 1, (32, RANDOM_LENGTH), generator=random)
        tokens_BT = F.pad(targets_BT[:, :-1], (1, 0))
        loss = model.loss(
            tokens_BT[:, :1], torch.zeros(32, dtype=torch.long), tokens_BT, targets_BT
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def gradient_through_layers(residual: bool, depth: int = 24, width: int = 32) -> list[float]:
    """Return the gradient at the input of each of many sigmoid layers, from the first on.

    Their matrices are orthogonal: they change no length, only the sigmoids do.
    """
    inputs = [random_vectors(1, width).requires_grad_()]
    for seed in range(depth):
        weight = nn.init.orthogonal_(torch.empty(width, width).double(), generator=seeded(seed))
        layer = torch.sigmoid(inputs[-1] @ weight)
        inputs.append(inputs[-1] + layer if residual else layer)
    gradients = torch.autograd.grad(inputs[-1].sum(), inputs[:-1])
    return [gradient.norm().item() for gradient in gradients]


def encoder_stack(norm: str, depth: int) -> tuple[list[EncoderBlock], list[Tensor]]:
    """Return new encoder blocks and the residual stream after each.

    `norm` is "pre", "post" or "none".
    """
    x_BSD, mask_B11S = random_vectors(8, 10, 32), torch.ones(8, 1, 1, 10, dtype=torch.bool)
    stack = initialized(
        lambda: nn.ModuleList(EncoderBlock(32, 4, 128, 0.0, norm != "post") for _ in range(depth))
    )
    blocks, streams = [], []
    for block in stack.children():
        assert isinstance(block, EncoderBlock)
        if norm == "none":
            for name in ("attention_norm", "mlp_norm"):
                setattr(block, name, nn.Identity())
        x_BSD = block(x_BSD, mask_B11S)
        blocks.append(block)
        streams.append(x_BSD)
    return blocks, streams


def stream_sizes(norm: str) -> list[float]:
    """Return the root mean square of the residual stream after each of 24 blocks."""
    return [x_BSD.square().mean().sqrt().item() for x_BSD in encoder_stack(norm, 24)[1]]


def gradients_by_block(norm: str) -> list[float]:
    """Return the gradient of the weights of each of 12 new blocks, from the first to the last."""
    blocks, streams = encoder_stack(norm, 12)
    features_BSD = F.layer_norm(streams[-1], (32,))
    classes_DV = random_vectors(32, 100) / 32**0.5
    targets_N = torch.randint(100, (80,), generator=seeded())
    F.cross_entropy(features_BSD.flatten(0, 1) @ classes_DV, targets_N).backward()
    gradients = (block.mlp.up.weight.grad for block in blocks)
    return [gradient.norm().item() for gradient in gradients if gradient is not None]


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield "What eat becomes, from its scores with the three words of I eat bread:"
    parts = zip(SCORES.softmax(0).tolist(), WORDS, strict=True)
    yield "  " + " + ".join(f"{weight:.3f} v({word})" for weight, word in parts)
    shared, _, eat_bread, bread_eat = asymmetry()
    yield "Scores of eat for bread and of bread for eat"
    yield f"  one matrix for query and key    {shared:5.2f} and {shared:5.2f}"
    yield f"  two matrices                    {eat_bread:5.2f} and {bread_eat:5.2f}"
    yield "Scores of d products, and the entropy of the weights of 16 keys (at most 2.77 nats):"
    yield "      d   variance   entropy   divided by sqrt(d): variance   entropy"
    for width, (variance, entropy, scaled_variance, scaled_entropy) in score_statistics().items():
        yield (
            f"  {width:5} {variance:10.1f} {entropy:9.2f} "
            f"{scaled_variance:29.2f} {scaled_entropy:9.2f}"
        )
    yield "A word's vector in I eat bread and in bread eat I differs by"
    yield f"  {order_difference(False):.2f} without positions, {order_difference(True):.2f} with them"
    yield "Weights behind the mask, while J'aime les chats is written:"
    for row in masked_weights().tolist():
        yield "  " + "  ".join(f"{weight:.3f}" for weight in row)
    yield "Gradients of the second of four words, by each word:"
    yield "  " + "  ".join(f"{gradient:.3f}" for gradient in future_gradients())
    yield f"Random text of {SYMBOLS} symbols, which nothing can predict:"
    yield f"  with the mask {loss_on_random_text(True):.2f} nats, without {loss_on_random_text(False):.2f}"
    yield "Two averages in a row differ from a single one of the products of their matrices by"
    collapsed, bent = two_layers_as_one(False), two_layers_as_one(True)
    yield f"  {collapsed:.2f} without a feed-forward layer between them, {bent:.2f} with one"
    with_sum, without = gradient_through_layers(True)[0], gradient_through_layers(False)[0]
    yield "Gradient through 24 sigmoid layers"
    yield f"  x = layer(x)      {without:.0e}"
    yield f"  x = x + layer(x)  {with_sum:.1f}"
    yield "Size of the residual stream after 1, 8 and 24 blocks"
    for norm, name in (("none", "without LayerNorm"), ("pre", "pre-norm"), ("post", "post-norm")):
        sizes = stream_sizes(norm)
        yield f"  {name:<18} {sizes[0]:6,.1f} {sizes[7]:6,.1f} {sizes[23]:8,.1f}"
    yield "Gradient of the first and of the last of 12 blocks, before any training"
    for norm, name in (("pre", "pre-norm"), ("post", "post-norm")):
        gradients = gradients_by_block(norm)
        yield f"  {name:<18} {gradients[0]:.2f}   {gradients[-1]:.2f}"
    model = trained_transformer()
    yield "A trained Transformer:"
    for en, fr in zip(SENTENCES, translate_sentences(model, SENTENCES), strict=True):
        yield f"  {en} -> {fr}"
    for name, share in matches_by_length(model).items():
        yield f"  without an error, {name:<15} {share:4.0%}"


def mask() -> Sequence[Panel]:
    """Chapter 13: the causal mask under equal scores, and sinusoidal positions."""
    text = ["I", "eat", "bread", "and", "jam"]
    equal_BHTK = torch.zeros(1, 1, len(text), 8)
    causal_TS = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    weights = attention_weights(equal_BHTK, equal_BHTK, causal_TS)[0, 0]
    labels = [
        [str(Fraction(weight).limit_denominator(9)) for weight in row] for row in weights.tolist()
    ]
    title = "equal scores behind the mask"
    positions = Heatmap(
        sinusoids(48, 32), "unit", "position", title="positions", colorbar_label="sine or cosine"
    )
    return [Heatmap(weights, "looks at", "the word", text, text, labels, title), positions]


def highways() -> Sequence[Panel]:
    """Chapter 13: gradients with and without residual connections, and LayerNorm on and off."""
    layers, blocks = torch.arange(1, 25), torch.arange(1, 25)
    gradients = [
        Series(
            layers,
            torch.tensor(gradient_through_layers(residual)),
            color,
            label,
            label_index=9,
            label_offset=(0, offset),
        )
        for residual, color, label, offset in (
            (True, BLUE, "x + layer(x)", -12),
            (False, ORANGE, "layer(x)", -14),
        )
    ]
    sizes = [
        Series(
            blocks,
            torch.tensor(stream_sizes(norm)),
            color,
            label,
            label_index=11,
            label_offset=offset,
        )
        for norm, color, label, offset in (
            ("none", ORANGE, "without LayerNorm", (-100, 14)),
            ("pre", BLUE, "pre-norm", (0, 12)),
            ("post", GREY, "post-norm", (0, -9)),
        )
    ]
    return [
        LinePlot("layer", "gradient at its input", gradients, "24 sigmoid layers", log_y=True),
        LinePlot(
            "block",
            "size of the residual stream",
            sizes,
            "24 new blocks",
            log_y=True,
            y_limits=(0.3, 1e5),
        ),
    ]


def cross_attention() -> Sequence[Panel]:
    """Chapter 13: the cross-attention of a trained Transformer, the two heads of its layer."""
    words, weights_LHTS = attention_over_source(trained_transformer(), CROSS, "cross")
    return [
        attention_panel(CROSS, words, weights_TS, f"head {head}")
        for head, weights_TS in enumerate(weights_LHTS[-1], 1)
    ]


FIGURES: Sequence[Callable[[], Sequence[Panel]]] = (mask, highways, cross_attention)

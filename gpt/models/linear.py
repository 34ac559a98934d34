"""Chapters 1 to 4: a line, products, a probability, many classes.

    1 linear     y = w·x + b                                  Legendre 1805
    2 sigma-pi   y = sum_i w_i prod_j x_j                     Rumelhart, Hinton & McClelland 1986
    3 logistic   p = sigmoid(w·x + b)                         Cox 1958
    4 softmax    p_k = exp(z_k / T) / sum_j exp(z_j / T)      Bridle 1990
                 z = W x + b

Each fixes one limitation of the model before it. A line adds its inputs, so one input cannot change
the effect of another; a product can. Neither expresses certainty; a sigmoid turns the output into
a probability. That covers two classes; a softmax covers many. None of the four learns where to
bend; the networks of `mlp` do.

The models of numbers take inputs x_BD, D numbers per example. Two of the four chapters also have a
language model, whose inputs are the last tokens.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import ActivationMap, LanguageModel, Model, State


def gradient_step(model: Model, rate: float, *batch: Tensor) -> Tensor:
    """Take one step of gradient descent with autograd. Works for every model; returns the loss."""
    loss = model.loss(*batch)  # 1 predict, 2 compute the loss
    loss.backward()  # 3 compute the gradient of the loss by each weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)  # 4 move each weight against its gradient
            parameter.grad = None  # 5 reset, or the next gradient would be added to this one
    return loss.detach()


def format_sum(terms: Iterable[tuple[float, str]]) -> str:
    """[(2.0, 'x z'), (-1.5, '')] -> '2.00 x z - 1.50'. Terms that round to 0 are left out."""
    text = ""
    for weight, product in terms:
        number = f"{abs(weight):.2f}"
        if float(number):
            sign = (" - " if text else "-") if weight < 0 else (" + " if text else "")
            text += f"{sign}{number} {product}".rstrip()
    return text or "0"


class Regression(Model):
    """The base class of models of a number: `forward` returns prediction_B from x_BD."""

    supported_tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the mean squared error of y_B given x_BD; ValueError if y_B has another shape."""
        x_BD, y_B = batch
        prediction_B = self(x_BD)
        if prediction_B.shape != y_B.shape:
            raise ValueError(
                f"expected y of shape {list(prediction_B.shape)}, one number per example, "
                f"not {list(y_B.shape)}"
            )
        return ((prediction_B - y_B) ** 2).mean()


class Linear(Regression):
    """A line, or a plane with more than one input: y = w·x + b."""

    chapter: ClassVar[int] = 1
    year: ClassVar[int] = 1805
    paper: ClassVar[str] = "Legendre, Nouvelles méthodes pour la détermination des orbites"
    idea: ClassVar[str] = "a line, fitted by gradient descent"
    equation: ClassVar[str] = "y = w·x + b"

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        if inputs < 1:
            raise ValueError(f"inputs must be at least 1, not {inputs}")
        # Any initial value works: the squared error of a line is convex.
        self.weight = nn.Parameter(torch.randn(inputs))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return y_B."""
        return x_BD @ self.weight + self.bias

    def weighted_sum(self, inputs: Sequence[str]) -> str:
        """Return w·x + b as text."""
        terms = zip(self.weight.tolist(), inputs, strict=True)
        return format_sum([*terms, (self.bias.item(), "")])

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return y = w·x + b."""
        return [f"y = {self.weighted_sum(inputs)}"]

    @torch.no_grad()
    def gradient_step_by_hand(
        self, rate: float, x_BD: Tensor, y_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take the five steps of `gradient_step` with the calculus written out.

        Returns prediction_B, the loss, and its gradients by weight_D and by the bias.
        """
        prediction_B = self(x_BD)  # 1 predict
        error_B = prediction_B - y_B
        loss = (error_B**2).mean()  # 2 compute the loss
        weight_gradient_D = 2 * error_B @ x_BD / len(x_BD)  # 3 compute d loss / dw ...
        bias_gradient = 2 * error_B.mean()  # ... and d loss / db
        self.weight.sub_(rate * weight_gradient_D)  # 4 move against the gradient
        self.bias.sub_(rate * bias_gradient)
        return prediction_B, loss, weight_gradient_D, bias_gradient  # 5 nothing to reset


class SigmaPi(Regression):
    """A weighted sum of products, in which one input changes the slope of another.

        y = sum_i w_i prod_j x_j

    It is linear in its weights and is fitted like a line. A smooth law is fitted exactly and
    extrapolated, but it cannot switch from one law to another.

    Args:
        products: For each product, the indices of its inputs; an empty product is 1, the bias.
    """

    chapter: ClassVar[int] = 2
    year: ClassVar[int] = 1986
    paper: ClassVar[str] = "Rumelhart, Hinton & McClelland, A General Framework for PDP"
    idea: ClassVar[str] = "products of inputs: one input changes another's slope"
    equation: ClassVar[str] = "y = sum_i w_i prod_j x_j"

    def __init__(
        self, inputs: int = 2, products: tuple[tuple[int, ...], ...] = ((0, 1), (0,), ())
    ) -> None:
        super().__init__()
        indices = [index for product in products for index in product]
        if not products or not all(0 <= index < inputs for index in indices):
            raise ValueError(
                f"products must be lists of indices of the {inputs} inputs, counted from 0, "
                f"not {products}"
            )
        self.products = [list(product) for product in products]
        # Zero is as good as any initial value: the loss is convex.
        self.weight = nn.Parameter(torch.zeros(len(products)))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return y_B."""
        products_BF = torch.stack([x_BD[:, indices].prod(-1) for indices in self.products], dim=-1)
        return products_BF @ self.weight

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return the sum of products."""
        products = [" ".join(inputs[i] for i in indices) for indices in self.products]
        return [f"y = {format_sum(zip(self.weight.tolist(), products, strict=True))}"]


class Logistic(Model):
    """The probability of class 1: p = sigmoid(w·x + b), sigmoid(z) = 1 / (1 + e^-z).

    A label y has the likelihood p^y (1 - p)^(1 - y). The loss is its negative logarithm, whose
    gradient by w is (p - y) x: the error times the input.
    """

    chapter: ClassVar[int] = 3
    year: ClassVar[int] = 1958
    paper: ClassVar[str] = "Cox, The Regression Analysis of Binary Sequences"
    idea: ClassVar[str] = "a sigmoid: from a number to a probability"
    equation: ClassVar[str] = "p = sigmoid(w·x + b)"
    supported_tasks: ClassVar[tuple[str, ...]] = ("binary-classification",)

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        self.score = Linear(inputs)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return probability_B of class 1."""
        return torch.sigmoid(self.score(x_BD))

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Return the probability of class 1."""
        return [f"p({classes[1]}) = sigmoid({self.score.weighted_sum(inputs)})"]

    def classify(self, x_BD: Tensor) -> Tensor:
        """Return class_B: 1 where its probability is at least a half, else 0."""
        return (self(x_BD) >= 0.5).long()

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the mean binary cross-entropy in nats of y_B, 0 or 1, given x_BD."""
        x_BD, y_B = batch
        score_B = self.score(x_BD)
        # -y log p - (1 - y) log(1 - p) = log(1 + e^z) - y z, which never takes the log of 0.
        return (F.softplus(score_B) - y_B * score_B).mean()


def layer_sums(layer: nn.Linear, inputs: Sequence[str]) -> list[str]:
    """Return each output of a layer as text: a weighted sum of `inputs`."""
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [format_sum([*zip(w, inputs, strict=True), (b, "")]) for w, b in rows]


def softmax(logits_V: Tensor, temperature: float = 1.0) -> Tensor:
    """Return probabilities_V = exp(z_k / T) / sum_j exp(z_j / T) over the last axis.

    A high temperature T makes them more even; as T falls to 0, the largest approaches 1.
    """
    # Only differences matter: with the largest logit shifted to 0 no exponential overflows.
    powers_V = ((logits_V - logits_V.detach().amax(-1, keepdim=True)) / temperature).exp()
    return powers_V / powers_V.sum(-1, keepdim=True)


class Softmax(Model):
    """Many classes: a linear score for each, and a softmax over the scores.

    With two classes it is the logistic regression of the difference of the scores. Its decision
    boundaries are straight.

    Args:
        classes: Number of classes, V.
        temperature: Divides the scores; a higher one gives more even probabilities.
    """

    chapter: ClassVar[int] = 4
    year: ClassVar[int] = 1990
    paper: ClassVar[str] = "Bridle, Probabilistic Interpretation of Feedforward Classification"
    idea: ClassVar[str] = "a softmax over many classes"
    equation: ClassVar[str] = "p = softmax(W x + b)"
    supported_tasks: ClassVar[tuple[str, ...]] = ("binary-classification", "classification")

    def __init__(self, inputs: int = 1, classes: int = 3, temperature: float = 1.0) -> None:
        super().__init__()
        if min(inputs, classes) < 1 or temperature <= 0:
            raise ValueError(
                "inputs and classes must be at least 1 and the temperature above 0, "
                f"not {inputs}, {classes} and {temperature}"
            )
        self.scores: nn.Module = nn.Linear(inputs, classes)
        self.temperature = temperature

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return probabilities_BV."""
        return softmax(self.scores(x_BD), self.temperature)

    def formulas(self, inputs: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Return the score of each class."""
        scores = zip(classes, layer_sums(cast(nn.Linear, self.scores), inputs), strict=True)
        divided = "" if self.temperature == 1 else f" / {self.temperature:g}"
        return [f"p = softmax(score{divided})", *(f"score({k}) = {z}" for k, z in scores)]

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of class_B given x_BD."""
        x_BD, class_B = batch
        logits_BV = self.scores(x_BD) / self.temperature
        target_logits_B = logits_BV.gather(-1, class_B.unsqueeze(-1)).squeeze(-1)
        return (logits_BV.logsumexp(-1) - target_logits_B).mean()  # -log p of the true class


class BigramLM(LanguageModel):
    """Softmax regression of the next token on the last one: a learned bigram table.

        logits = W onehot(last token) + b

    A one-hot input selects a row of W, so W is stored as a table of V rows of V logits, 16.8
    million at V = 4096: bigram counts (Markov 1913, Shannon 1948), learned. b holds the logits of
    each token without context, for rows too rare to be learned. The model shares nothing between
    similar tokens and ignores all tokens before the last.
    """

    chapter: ClassVar[int] = 4
    year: ClassVar[int] = 1990
    paper: ClassVar[str] = Softmax.paper
    idea: ClassVar[str] = Softmax.idea
    equation: ClassVar[str] = Softmax.equation

    def __init__(self, vocab_size: int, context_length: int) -> None:
        super().__init__(vocab_size, context_length)
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        # Uniform predictions at first. The loss is convex, so no symmetry must be broken.
        nn.init.zeros_(self.table.weight)

    def init_state(self, batch_size: int, length: int) -> State:  # noqa: ARG002 (no state)
        """Return an empty dict: the last token is always among the new ones."""
        return {}

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:  # noqa: ARG002
        """Return tokens_BT1, the index of the 1 in each one-hot input."""
        return tokens_BT.unsqueeze(-1)

    def logits(self, features_BTD: Tensor) -> Tensor:
        """Return logits_BTV."""
        return self.table(features_BTD.squeeze(-1)) + self.bias

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """Return `last token`: weight 1 for each token itself."""
        batch_size, length = tokens_BT.shape
        weights_BTS = torch.eye(length, device=tokens_BT.device).expand(batch_size, -1, -1)
        return [ActivationMap("last token", weights_BTS[:, None, None], tokens_BT, tokens_BT)]


NO_TOKEN = -1
"""The token id of window positions before the start of a sequence."""


class WindowLM(LanguageModel):
    """The base class of language models of the last W tokens: embeddings, window, unembedding.

    Before the start of a sequence, embeddings are zero. The state is the last W - 1 tokens, so
    sequences have no maximum length, and every token costs the same.

    Args:
        window: Tokens of the window, W.
        width: Width of an embedding, D.
        hidden: Width of the features, F.
    """

    def __init__(
        self, vocab_size: int, context_length: int, window: int, width: int, hidden: int
    ) -> None:
        super().__init__(vocab_size, context_length)
        if min(window, width, hidden) < 1:
            raise ValueError(
                f"window, width and hidden must be at least 1, not {window}, {width} and {hidden}"
            )
        self.window = window
        self.embedding = nn.Embedding(vocab_size, width)
        self.unembedding = nn.Linear(hidden, vocab_size, bias=False)
        # Uniform predictions at first. The features are not zero, so the unembedding learns first.
        nn.init.zeros_(self.unembedding.weight)

    def init_state(self, batch_size: int, length: int) -> State:  # noqa: ARG002 (constant size)
        """Return `last`, the W - 1 tokens before the next one, all NO_TOKEN."""
        device = self.embedding.weight.device
        return {"last": torch.full((batch_size, self.window - 1), NO_TOKEN, device=device)}

    def embed(self, tokens_BT: Tensor, state: State | None) -> Tensor:
        """Return embeddings_BSD of the last W - 1 tokens and the new ones, S = W - 1 + T.

        The window of new token t covers the positions t to t + W - 1.
        """
        batch_size, length = tokens_BT.shape
        last_BW = self.init_state(batch_size, 0)["last"] if state is None else state["last"]
        ids_BS = torch.cat([last_BW, tokens_BT], dim=1)
        if state is not None:
            state["last"].copy_(ids_BS[:, length:])
        return self.embedding(ids_BS.clamp(min=0)) * (ids_BS != NO_TOKEN).unsqueeze(-1)

    def contributions(self, embeddings_BSD: Tensor) -> Tensor:
        """Return contributions_BSWF of each embedding to the first F units, by window position."""
        raise NotImplementedError

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """Return `token contribution`: the norms of the contributions of each window's tokens."""
        norms_BSW = self.contributions(self.embedding(tokens_BT)).norm(dim=-1)
        positions_S = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        # The position of token s in the window of token t.
        offsets_TS = positions_S - positions_S.unsqueeze(1) + self.window - 1
        inside_TS = (offsets_TS >= 0) & (offsets_TS < self.window)
        weights_BTS = norms_BSW[:, positions_S, offsets_TS.clamp(0, self.window - 1)] * inside_TS
        weights_BLHTS = weights_BTS[:, None, None]
        return [ActivationMap("token contribution", weights_BLHTS, tokens_BT, tokens_BT)]


class SigmaPiLM(WindowLM):
    """Products of the last tokens' embeddings, and a weighted sum of them as each next-token logit.

        feature_i = prod_j (1 + a_ij · embedding(token j back))
        logits    = W norm(features)

    Multiplied out, a feature is the sum of all 2^W products of its factors: a token can act alone
    or change the effect of one or several others. Before the start of the sequence, factors are 1.

    Args:
        hidden: Number of products, F.
    """

    chapter: ClassVar[int] = 2
    year: ClassVar[int] = 1986
    paper: ClassVar[str] = SigmaPi.paper
    idea: ClassVar[str] = SigmaPi.idea
    equation: ClassVar[str] = SigmaPi.equation

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        window: int = 4,
        width: int = 128,
        hidden: int = 256,
    ) -> None:
        super().__init__(vocab_size, context_length, window, width, hidden)
        self.factors = nn.Linear(width, window * hidden, bias=False)
        # The second moment of a feature is the product of its factors', (1 + 1/W)^W < e.
        nn.init.normal_(self.factors.weight, std=(width * window) ** -0.5)

    def contributions(self, embeddings_BSD: Tensor) -> Tensor:
        """Return contributions_BSWF: the difference of each factor from 1, which has no effect."""
        return self.factors(embeddings_BSD).unflatten(-1, (self.window, -1))

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """Return features_BTF."""
        factors_BSWF = 1 + self.contributions(self.embed(tokens_BT, state))
        length = tokens_BT.shape[1]
        products_BTF = torch.ones_like(factors_BSWF[:, :length, 0])
        for w in range(self.window):
            products_BTF = products_BTF * factors_BSWF[:, w : w + length, w]
        return F.rms_norm(products_BTF, products_BTF.shape[-1:])

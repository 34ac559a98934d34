"""Chapters 1 to 4, an equation each: a line, products, a probability, many classes.

    1 linear     y = w·x + b                                  Legendre 1805
    2 sigma-pi   y = sum_i w_i prod_j x_j                     Rumelhart, Hinton & McClelland 1986
    3 logistic   p = sigmoid(w·x + b)                         Cox 1958
    4 softmax    p_k = exp(z_k / T) / sum_j exp(z_j / T)      Bridle 1990
                 z = W x + b

Each mends one thing in the one before it. A line adds its inputs up, so one input cannot
change what another is worth: a product can. Neither says how sure it is: squashed to (0, 1),
a number is a probability. That answers yes or no: a softmax chooses among many. All four
bend nowhere that was not chosen by hand; the networks of `mlp` learn where to bend.

On tables of numbers x_BD has D inputs a row. Two of the four also speak: a language model
whose inputs are the last tokens stands beside the model of numbers.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.models.base import ActivationMap, LanguageModel, Model, State


def squared_error(prediction_B: Tensor, y_B: Tensor) -> Tensor:
    """The mean over rows of (prediction - y)^2; shapes must agree, so that nothing broadcasts."""
    if prediction_B.shape != y_B.shape:
        raise ValueError(
            f"expected y of shape {list(prediction_B.shape)}, one number a row, not {list(y_B.shape)}"
        )
    return ((prediction_B - y_B) ** 2).mean()


def descend(model: Model, rate: float, *batch: Tensor) -> Tensor:
    """One step of gradient descent on any model, the blame left to autograd; returns the loss."""
    loss = model.loss(*batch)  # 1 predict, 2 measure the loss
    loss.backward()  # 3 blame: the gradient of the loss by each weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)  # 4 move each weight a little against it
            parameter.grad = None  # 5 forget, or the next step would add to this one's
    return loss.detach()


class Linear(Model):
    """A line, or with more inputs a plane: y = w·x + b.

    Args:
        inputs: Numbers in a row, D.
    """

    chapter: ClassVar[int] = 1
    year: ClassVar[int] = 1805
    paper: ClassVar[str] = "Legendre, Nouvelles méthodes pour la détermination des orbites"
    idea: ClassVar[str] = "a line, fitted by gradient descent"
    supported_tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        if inputs < 1:
            raise ValueError(f"inputs must be at least 1, not {inputs}")
        # Any start will do: the squared error of a line has one valley.
        self.weight = nn.Parameter(torch.randn(inputs))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x_BD: Tensor) -> Tensor:
        """y_B."""
        return x_BD @ self.weight + self.bias

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean squared error of y_B given x_BD."""
        x_BD, y_B = batch
        return squared_error(self(x_BD), y_B)

    @torch.no_grad()
    def descend_by_hand(
        self, rate: float, x_BD: Tensor, y_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The five steps of `descend`, with the calculus written out.

        Returns prediction_B, the loss, and its gradients by weight_D and by the bias.
        """
        prediction_B = self(x_BD)  # 1 predict
        error_B = prediction_B - y_B
        loss = (error_B**2).mean()  # 2 measure the loss
        weight_gradient_D = 2 * error_B @ x_BD / len(x_BD)  # 3 blame: d loss / dw ...
        bias_gradient = 2 * error_B.mean()  # ... and d loss / db
        self.weight.sub_(rate * weight_gradient_D)  # 4 move a little against it
        self.bias.sub_(rate * bias_gradient)
        return prediction_B, loss, weight_gradient_D, bias_gradient  # 5 nothing is kept


class SigmaPi(Model):
    """A weighted sum of products: one input changes another's slope.

        y = sum_i w_i prod_j x_j

    A sum of products is still a sum: it is fitted like a line, and follows a smooth law
    exactly, also far from the data. It cannot switch from one law to another.

    Args:
        inputs: Numbers in a row, D.
        products: For each product, the places of the inputs in it; the empty one is 1, the bias.
    """

    chapter: ClassVar[int] = 2
    year: ClassVar[int] = 1986
    paper: ClassVar[str] = "Rumelhart, Hinton & McClelland, A General Framework for PDP"
    idea: ClassVar[str] = "products of inputs: one input changes another's slope"
    supported_tasks: ClassVar[tuple[str, ...]] = ("regression",)

    def __init__(
        self, inputs: int = 2, products: tuple[tuple[int, ...], ...] = ((0, 1), (0,), ())
    ) -> None:
        super().__init__()
        places = [place for product in products for place in product]
        if not products or not all(0 <= place < inputs for place in places):
            raise ValueError(
                f"products must be lists of places of the {inputs} inputs, counted from 0, "
                f"not {products}"
            )
        self.products = [list(product) for product in products]
        # Zero is as good a start as any: the loss has one valley.
        self.weight = nn.Parameter(torch.zeros(len(products)))

    def forward(self, x_BD: Tensor) -> Tensor:
        """y_B."""
        products_BF = torch.stack([x_BD[:, places].prod(-1) for places in self.products], dim=-1)
        return products_BF @ self.weight

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean squared error of y_B given x_BD."""
        x_BD, y_B = batch
        return squared_error(self(x_BD), y_B)


class Logistic(Model):
    """The probability that a row is of class 1: p = sigmoid(w·x + b), sigmoid(z) = 1 / (1 + e^-z).

    A row's label y has the likelihood p^y (1 - p)^(1 - y); the loss is minus its logarithm,
    and by w its gradient is (p - y) x: the error, times what was seen.

    Args:
        inputs: Numbers in a row, D.
    """

    chapter: ClassVar[int] = 3
    year: ClassVar[int] = 1958
    paper: ClassVar[str] = "Cox, The Regression Analysis of Binary Sequences"
    idea: ClassVar[str] = "squash to a probability"
    supported_tasks: ClassVar[tuple[str, ...]] = ("binary-classification",)

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        self.score = Linear(inputs)

    def forward(self, x_BD: Tensor) -> Tensor:
        """probability_B of class 1."""
        return torch.sigmoid(self.score(x_BD))

    def classify(self, x_BD: Tensor) -> Tensor:
        """class_B: 1 where its probability is at least a half, else 0."""
        return (self(x_BD) >= 0.5).long()

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean binary cross-entropy in nats of y_B, 0 or 1, given x_BD."""
        x_BD, y_B = batch
        score_B = self.score(x_BD)
        # -y log p - (1 - y) log(1 - p) = log(1 + e^z) - y z, which never takes the log of 0.
        return (F.softplus(score_B) - y_B * score_B).mean()


def softmax(logits_V: Tensor, temperature: float = 1.0) -> Tensor:
    """probabilities_V = exp(z_k / T) / sum_j exp(z_j / T) over the last axis; any leading axes will do.

    The greater the temperature T, the more even. As it falls to 0, all goes to the largest.
    """
    # Only differences matter: with the largest at 0 no exponential overflows.
    powers_V = ((logits_V - logits_V.detach().amax(-1, keepdim=True)) / temperature).exp()
    return powers_V / powers_V.sum(-1, keepdim=True)


class Softmax(Model):
    """Many classes: a line for each, and a softmax to choose.

    With two classes it is the logistic regression of the lines' difference. Like it, it
    divides the inputs by straight borders only.

    Args:
        inputs: Numbers in a row, D.
        classes: Number of classes, V.
        temperature: How soft the choice is: scores are divided by it.
    """

    chapter: ClassVar[int] = 4
    year: ClassVar[int] = 1990
    paper: ClassVar[str] = "Bridle, Probabilistic Interpretation of Feedforward Classification"
    idea: ClassVar[str] = "many classes"
    supported_tasks: ClassVar[tuple[str, ...]] = ("binary-classification", "classification")

    def __init__(self, inputs: int = 1, classes: int = 3, temperature: float = 1.0) -> None:
        super().__init__()
        if min(inputs, classes) < 1 or temperature <= 0:
            raise ValueError(
                "inputs and classes must be at least 1 and the temperature above 0, "
                f"not {inputs}, {classes} and {temperature}"
            )
        self.scores = nn.Linear(inputs, classes)
        self.temperature = temperature

    def forward(self, x_BD: Tensor) -> Tensor:
        """probabilities_BV."""
        return softmax(self.scores(x_BD), self.temperature)

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats of class_B given x_BD."""
        x_BD, class_B = batch
        logits_BV = self.scores(x_BD) / self.temperature
        chosen_B = logits_BV.gather(-1, class_B.unsqueeze(-1)).squeeze(-1)
        return (logits_BV.logsumexp(-1) - chosen_B).mean()  # -log p of the true class


class BigramLM(LanguageModel):
    """The softmax regression of the next token by the last: a learned table of bigrams.

        logits = W onehot(last token) + b

    A one-hot input only picks a row of W, so W is stored as a table of V rows of V logits,
    16.8 million at V = 4096: the count of pairs (Markov 1913, Shannon 1948), learned. b is
    the logits of each token whatever came before, for rows too rare to be learned. It knows
    nothing of what two tokens have in common, and nothing before the last.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a row that it is trained on at once.
    """

    chapter: ClassVar[int] = 4
    year: ClassVar[int] = 1990
    paper: ClassVar[str] = Softmax.paper
    idea: ClassVar[str] = Softmax.idea

    def __init__(self, vocab_size: int, context_length: int) -> None:
        super().__init__(vocab_size, context_length)
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        # All tokens alike at first; the loss has one valley, so there is nothing to tell apart.
        nn.init.zeros_(self.table.weight)

    def init_state(self, rows: int, length: int) -> State:  # noqa: ARG002 (nothing grows)
        """Nothing: the last token is all there is, and it is always the new one."""
        return {}

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:  # noqa: ARG002
        """tokens_BT1: where the only 1 of each one-hot input stands."""
        return tokens_BT.unsqueeze(-1)

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """`last token`: all that counts is the token itself."""
        rows, length = tokens_BT.shape
        weights_BTS = torch.eye(length, device=tokens_BT.device).expand(rows, -1, -1)
        return [ActivationMap("last token", weights_BTS[:, None, None], tokens_BT, tokens_BT)]

    def logits(self, features_BTD: Tensor) -> Tensor:
        """logits_BTV."""
        return self.table(features_BTD.squeeze(-1)) + self.bias


NOTHING = -1
"""Where a window reaches before the beginning of its row."""


class Windowed(LanguageModel):
    """What every language model over the last W tokens shares: embeddings, window, unembedding.

    Before the beginning of a row stands nothing: an embedding of zeros. Its state is the
    last W - 1 tokens, so a row can go on for ever, at one price a token.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a row that it is trained on at once.
        window: Tokens that it sees, W: the window.
        width: Width of an embedding, D.
        hidden: Width of the features, F.
    """

    def __init__(
        self, vocab_size: int, context_length: int, window: int, width: int, hidden: int
    ) -> None:
        super().__init__(vocab_size, context_length)
        if min(window, width, hidden) < 1:
            raise ValueError(
                f"span, width and hidden must be at least 1, not {window}, {width} and {hidden}"
            )
        self.window = window
        self.embedding = nn.Embedding(vocab_size, width)
        self.unembedding = nn.Linear(hidden, vocab_size, bias=False)
        # All tokens alike at first. The features are not zero, so this learns, then they do.
        nn.init.zeros_(self.unembedding.weight)

    def init_state(self, rows: int, length: int) -> State:  # noqa: ARG002 (nothing grows)
        """last_BW, without the newest: the tokens that the next one's window also holds."""
        device = self.embedding.weight.device
        return {"last": torch.full((rows, self.window - 1), NOTHING, device=device)}

    def embed(self, tokens_BT: Tensor, state: State | None) -> Tensor:
        """embeddings_BSD of the W - 1 tokens before the new ones, and theirs: S = W - 1 + T.

        The window of new token t is places t to t + W - 1.
        """
        rows, length = tokens_BT.shape
        before_BW = self.init_state(rows, 0)["last"] if state is None else state["last"]
        ids_BS = torch.cat([before_BW, tokens_BT], dim=1)
        if state is not None:
            state["last"].copy_(ids_BS[:, length:])
        return self.embedding(ids_BS.clamp(min=0)) * (ids_BS != NOTHING).unsqueeze(-1)

    def effects(self, embeddings_BSD: Tensor) -> Tensor:
        """effects_BSWF: what each embedding does to the first F numbers, at each place of a window."""
        raise NotImplementedError

    def activation_maps(self, tokens_BT: Tensor) -> list[ActivationMap]:
        """`effect in the window`: the length of what each token of the window does to the first F numbers."""
        lengths_BSW = self.effects(self.embedding(tokens_BT)).norm(dim=-1)
        places_S = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        places_TS = places_S - places_S.unsqueeze(1) + self.window - 1  # in the window of token t
        inside_TS = (places_TS >= 0) & (places_TS < self.window)
        weights_BTS = lengths_BSW[:, places_S, places_TS.clamp(0, self.window - 1)] * inside_TS
        return [
            ActivationMap("effect in the window", weights_BTS[:, None, None], tokens_BT, tokens_BT)
        ]


class SigmaPiLM(Windowed):
    """Products of the last tokens' embeddings, and a weighted sum of them for each next token.

        feature_i = prod_j (1 + a_ij · embedding(token j back))
        logits    = W norm(features)

    Multiplied out, a feature is the sum over all 2^W products of its factors: a token may
    change the slope of another's, of two others', or stand alone. Where nothing is, the
    factor is 1.

    Args:
        vocab_size: Number of token ids, V.
        context_length: Tokens of a row that it is trained on at once.
        window: Tokens that it sees, W: the window.
        width: Width of an embedding, D.
        hidden: Number of products, F.
    """

    chapter: ClassVar[int] = 2
    year: ClassVar[int] = 1986
    paper: ClassVar[str] = SigmaPi.paper
    idea: ClassVar[str] = SigmaPi.idea

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
        # A feature's second moment is the product of its factors', (1 + 1/W)^W: less than e.
        nn.init.normal_(self.factors.weight, std=(width * window) ** -0.5)

    def effects(self, embeddings_BSD: Tensor) -> Tensor:
        """effects_BSWF: how far each factor is from 1, which changes nothing."""
        return self.factors(embeddings_BSD).unflatten(-1, (self.window, -1))

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Tensor:
        """features_BTF."""
        factors_BSWF = 1 + self.effects(self.embed(tokens_BT, state))
        length = tokens_BT.shape[1]
        products_BTF = torch.ones_like(factors_BSWF[:, :length, 0])
        for place in range(self.window):
            products_BTF = products_BTF * factors_BSWF[:, place : place + length, place]
        return F.rms_norm(products_BTF, products_BTF.shape[-1:])

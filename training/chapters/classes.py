"""Chapter 4: scores of many classes become probabilities."""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt.models.linear import BigramLM, Logistic, Softmax, softmax
from training.chapters.fitting import fit
from training.plots.panels import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    BarChart,
    LinePlot,
    Panel,
    Series,
)
from training.tasks.tables import CLASSIFICATION_TABLES, GRAINS

NEXT_WORDS = {"mat": 0.90, "hat": 0.05, "dog": 0.01, "others": 0.04}
"""Probabilities of the word after "The cat sat on the"."""

LABELS = {"rice": (1, 1, 0), "dark": (0, 1, 1), "food": (1, 1, 1)}
"""What each of GRAINS is."""

GRAIN_SIZES = torch.tensor([(7.0, 2.0), (5.0, 3.0), (3.0, 1.5)])
"""Length and width in millimeters of an average grain of each of GRAINS."""

TEXT = "the cat sat on the mat . the dog sat on the mat . the cat lay on the mat ."
WORDS = TEXT.split()
VOCABULARY = list(dict.fromkeys(WORDS))
"""The different words of the text: a word's place in this list is its token id."""
IDS = torch.tensor([[VOCABULARY.index(word) for word in WORDS]])
LAST_AND_NEXT = IDS[:, :-1], IDS[:, 1:]
"""Each token of the text and the one after it."""


def softmax_of_base(base: float, scores_V: Tensor) -> Tensor:
    """Return base^z_k / sum_j base^z_j."""
    return base**scores_V / (base**scores_V).sum()


def next_word_gradient(word: str) -> list[float]:
    """Return the gradient of the loss by the score of each of NEXT_WORDS, where `word` came next."""
    scores_V = torch.tensor(list(NEXT_WORDS.values())).log().requires_grad_()
    loss = -softmax(scores_V)[list(NEXT_WORDS).index(word)].log()
    (gradient_V,) = torch.autograd.grad(loss, scores_V)
    return gradient_V.tolist()


@functools.cache
def classes_and_labels() -> tuple[Softmax, dict[str, Logistic]]:
    """Return a softmax over the kinds of grain, and for each label a sigmoid; all see the darkness."""
    x_BD, class_B = CLASSIFICATION_TABLES["which-grain"](0).splits["train"]
    labels = {
        name: fit(Logistic, (x_BD, torch.tensor(of_class)[class_B]))
        for name, of_class in LABELS.items()
    }
    return fit(Softmax, (x_BD, class_B)), labels


def measured_grains() -> tuple[Tensor, Tensor]:
    """Return length and width of 50 grains of each kind as x_BD, and their kinds."""
    kind_B = torch.arange(3).repeat_interleave(50)
    noise_BD = torch.randn(150, 2, generator=torch.Generator().manual_seed(0))
    return GRAIN_SIZES[kind_B] + 0.6 * noise_BD, kind_B


def k_means(x_BD: Tensor, clusters: int, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Group points by closeness (Lloyd 1957); return centers_KD and the cluster of each point.

    The first center is the first point, each next one the point farthest from all centers so far.
    """
    centers_KD = x_BD[:1]
    for _ in range(clusters - 1):
        farthest = torch.cdist(x_BD, centers_KD).amin(-1).argmax()
        centers_KD = torch.cat([centers_KD, x_BD[farthest].unsqueeze(0)])
    for _ in range(steps):
        cluster_B = torch.cdist(x_BD, centers_KD).argmin(-1)  # each point to its nearest center
        centers_KD = torch.stack([x_BD[cluster_B == k].mean(0) for k in range(clusters)])
    return centers_KD, cluster_B


@functools.cache
def bigram() -> BigramLM:
    """Return a bigram model of TEXT."""
    return fit(lambda: BigramLM(len(VOCABULARY), len(WORDS)), LAST_AND_NEXT)


def next_word_scores(word: str) -> Tensor:
    """Return the bigram model's score of each word of the vocabulary after `word`."""
    return bigram()(torch.tensor([[VOCABULARY.index(word)]]))[0, 0].detach()


def bits_per_byte(loss: float) -> float:
    """Return the bits per byte of TEXT after its first word, from the mean loss per token."""
    num_bytes = len(TEXT.removeprefix(WORDS[0]).encode())
    return loss * (len(WORDS) - 1) / math.log(2) / num_bytes


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield f"softmax(1, 2, 8) = {_list(softmax(torch.tensor([1.0, 2.0, 8.0])))}"
    two_V = softmax(torch.tensor([3.0, 1.0]))
    sigmoid = torch.sigmoid(torch.tensor(3.0 - 1.0))
    yield f"softmax(3, 1) = {_list(two_V)}, and sigmoid(3 - 1) = {sigmoid:.3f}"
    scores_V = torch.tensor([3.0, 2.0, 1.0])
    yield "softmax(3, 2, 1) at a temperature of"
    for T in (0.25, 1.0, 4.0):
        yield f"  {T:<5g} {_list(softmax(scores_V, T))}"
    yield "with another base than e, which is another temperature:"
    for base in (2.0, 10.0):
        T = 1 / math.log(base)
        yield f"  base {base:<4g}{_list(softmax_of_base(base, scores_V))}   T = 1 / ln {base:g} = {T:.3f}"
    yield '"The cat sat on the": probability, loss if this word comes next, gradients by the scores'
    yield f"  {'':<8}{'p':>6}{'-ln p':>8}   {'mat':>6}{'hat':>6}{'dog':>6}{'others':>7}"
    for word in ("mat", "hat", "dog"):
        p = NEXT_WORDS[word]
        mat, hat, dog, others = next_word_gradient(word)
        yield f"  {word:<8}{p:6.2f}{-math.log(p):8.3f}   {mat:6.2f}{hat:6.2f}{dog:6.2f}{others:7.2f}"
    yield "One of three kinds (softmax), and several labels at once (sigmoids), from the darkness:"
    yield "  darkness" + "".join(f"{grain.name:>15}" for grain in GRAINS) + " |    rice  dark  food"
    classifier, labels = classes_and_labels()
    for darkness in (0.0, 0.1, 0.5, 1.0):
        x_BD = torch.tensor([[darkness]]).double()
        with torch.no_grad():
            kinds = "".join(f"{p:15.2f}" for p in classifier(x_BD)[0])
            answers = "".join(f"{model(x_BD).item():6.2f}" for model in labels.values())
        yield f"  {darkness:8.1f}{kinds} |  {answers}"
    x_BD, kind_B = measured_grains()
    centers_KD, cluster_B = k_means(x_BD, 3)
    yield "Without labels: 150 grains of three kinds, grouped by length and width alone"
    for cluster, (length, width) in enumerate(centers_KD.tolist()):
        counts = torch.bincount(kind_B[cluster_B == cluster], minlength=3).tolist()
        found = ", ".join(f"{n} {g.name}" for n, g in zip(counts, GRAINS, strict=True) if n)
        yield f"  center {length:.1f} x {width:.1f} mm: {found}"
    yield f'A bigram model of "{TEXT}"'
    yield "  token ids: " + " ".join(map(str, IDS[0, :7].tolist())) + " ..."
    untrained = BigramLM(len(VOCABULARY), len(WORDS))
    for name, model in (("untrained", untrained), ("trained", bigram())):
        loss = model.loss(*LAST_AND_NEXT).item()
        yield (
            f"  {name:<10}{loss:.3f} nats per token, perplexity {math.exp(loss):.2f}, "
            f"{bits_per_byte(loss):.3f} bits per byte"
        )
    yield '  after "the", at a temperature of'
    for T in (0.5, 1.0, 2.0):
        p_V = softmax(next_word_scores("the"), T).tolist()
        words = sorted(zip(p_V, VOCABULARY, strict=True), reverse=True)[:3]
        yield f"  {T:<5g}" + "".join(f"   {word} {p:.2f}" for p, word in words)


def _list(values: Tensor) -> str:
    """Format probabilities."""
    return f"({', '.join(f'{value:.3f}' for value in values.tolist())})"


def temperature() -> Sequence[Panel]:
    """Chapter 4: the softmax of the same scores at three temperatures."""
    scores = torch.tensor([3.0, 2.0, 1.0])
    names = [f"score {score:g}" for score in scores]
    panels = []
    for T in (0.25, 1.0, 4.0):
        p = softmax(scores, T).tolist()
        labels = [f"{share:.3f}" for share in p]
        panels.append(BarChart("probability", names, p, labels, f"T = {T:g}", 1.0))
    return panels


def clusters() -> Sequence[Panel]:
    """Chapter 4: grains of three kinds are told apart by their size, without labels."""
    x_BD, _ = measured_grains()
    centers_KD, cluster_B = k_means(x_BD, 3)
    series = []
    for cluster, color in enumerate((BLUE, ORANGE, GREEN)):
        length_N, width_N = x_BD[cluster_B == cluster].T
        name, widest = f"cluster {cluster + 1}", int(width_N.argmax())
        series.append(Series(length_N, width_N, color, name, "dots", widest, (-25, 14)))
    series.append(Series(centers_KD[:, 0], centers_KD[:, 1], BLACK, style="dots"))
    return [LinePlot("length (mm)", "width (mm)", series, y_limits=(0, 4.6))]


FIGURES = (temperature, clusters)

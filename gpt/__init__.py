"""Models of tensors only: no text, no corpora, no HTTP. Start reading in `gpt/models/base.py`.

docs/library.md shows how to use the package from Python.

`CHAPTERS` holds one model per chapter of docs/chapters/ by name, in order. `MODELS` holds the
language models among them. `TABULAR_MODELS` holds the models of numbers of those chapters whose
model in `CHAPTERS` is a language model.
"""

from gpt.generation import generate
from gpt.models.base import LanguageModel, Model, State
from gpt.models.gpt import GPT, GPT2
from gpt.models.linear import BigramLM, Linear, Logistic, SigmaPi, SigmaPiLM, Softmax
from gpt.models.mlp import MLP, MLPLM, Experts, ExpertsLM, MLPClassifier
from gpt.models.recurrent import GRU, LSTM, RNN
from gpt.models.seq2seq import Seq2Seq, Seq2SeqAttention
from gpt.models.transformer import Transformer
from gpt.models.word2vec import Word2Vec
from gpt.sampling import SamplingParams

CHAPTERS: dict[str, type[Model]] = {
    "linear": Linear,
    "sigma-pi": SigmaPiLM,
    "logistic": Logistic,
    "softmax": BigramLM,
    "mlp": MLPLM,
    "experts": ExpertsLM,
    "word2vec": Word2Vec,
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "seq2seq": Seq2Seq,
    "attention": Seq2SeqAttention,
    "transformer": Transformer,
    "gpt2": GPT2,
    "gpt": GPT,
}

MODELS: dict[str, type[LanguageModel]] = {
    name: model for name, model in CHAPTERS.items() if issubclass(model, LanguageModel)
}

TABULAR_MODELS: dict[str, type[Model]] = {
    "sigma-pi-table": SigmaPi,
    "softmax-table": Softmax,
    "mlp-table": MLP,
    "mlp-classifier-table": MLPClassifier,
    "experts-table": Experts,
}

# It takes the models from here.
from gpt.checkpoint import load_language_model  # noqa: E402

__all__ = [
    "CHAPTERS",
    "GPT",
    "GPT2",
    "MODELS",
    "TABULAR_MODELS",
    "LanguageModel",
    "Model",
    "SamplingParams",
    "State",
    "generate",
    "load_language_model",
]

"""Models, from tensors to tensors: no text, no files of text, no HTTP. Start with `model`.

CHAPTERS holds the model of each chapter by name, in order; MODELS those that speak;
TABULAR, of the chapters whose model speaks, the one that takes numbers.
"""

from gpt.models.base import LanguageModel, Model, State
from gpt.models.gpt import GPT, GPT2
from gpt.models.linear import BigramLM, Linear, Logistic, SigmaPi, SigmaPiLM, Softmax
from gpt.models.mlp import MLP, Experts, ExpertsLM, WindowLM
from gpt.models.recurrent import GRU, LSTM, RNN
from gpt.models.seq2seq import Seq2Seq, Seq2SeqAttention
from gpt.models.transformer import Transformer
from gpt.models.word2vec import Word2Vec

CHAPTERS: dict[str, type[Model]] = {
    "linear": Linear,
    "sigma-pi": SigmaPiLM,
    "logistic": Logistic,
    "softmax": BigramLM,
    "mlp": WindowLM,
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

TABULAR: dict[str, type[Model]] = {
    "sigma-pi-table": SigmaPi,
    "softmax-table": Softmax,
    "mlp-table": MLP,
    "experts-table": Experts,
}

__all__ = ["CHAPTERS", "GPT", "GPT2", "MODELS", "TABULAR", "LanguageModel", "Model", "State"]

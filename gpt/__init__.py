"""Models, from tensors to tensors: no text, no files of text, no HTTP. Start with `model`.

CHAPTERS holds the model of each chapter by name, in order; MODELS those that speak.
"""

from gpt.gpt import GPT, GPT2
from gpt.linear import BigramLM, Linear, Logistic, SigmaPiLM
from gpt.mlp import ExpertsLM, WindowLM
from gpt.model import LanguageModel, Model, State
from gpt.recurrent import GRU, LSTM, RNN
from gpt.seq2seq import Seq2Seq, Seq2SeqAttention
from gpt.transformer import Transformer
from gpt.word2vec import Word2Vec

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

__all__ = ["CHAPTERS", "GPT", "GPT2", "MODELS", "LanguageModel", "Model", "State"]

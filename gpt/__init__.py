"""Models, from tensors to tensors: no text, no files of text, no HTTP. Start with `model`.

MODELS holds every language model by name, in the order of the chapters.
"""

from gpt.gpt import GPT, GPT2
from gpt.linear import BigramLM, SigmaPiLM
from gpt.mlp import ExpertsLM, WindowLM
from gpt.model import LanguageModel, Model, State
from gpt.recurrent import GRU, LSTM, RNN
from gpt.seq2seq import Seq2Seq, Seq2SeqAttention
from gpt.transformer import Transformer

MODELS: dict[str, type[LanguageModel]] = {
    "sigma-pi": SigmaPiLM,
    "softmax": BigramLM,
    "mlp": WindowLM,
    "experts": ExpertsLM,
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "seq2seq": Seq2Seq,
    "attention": Seq2SeqAttention,
    "transformer": Transformer,
    "gpt2": GPT2,
    "gpt": GPT,
}

__all__ = ["GPT", "GPT2", "MODELS", "LanguageModel", "Model", "State"]

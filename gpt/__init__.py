"""Models, from tensors to tensors: no text, no files of text, no HTTP. Start with `model`.

MODELS holds every architecture by name, in historical order.
"""

from gpt.gpt import GPT
from gpt.model import LanguageModel, Model, State

MODELS: dict[str, type[LanguageModel]] = {"gpt": GPT}

__all__ = ["GPT", "MODELS", "LanguageModel", "Model", "State"]

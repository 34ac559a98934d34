"""The served models by name."""

import dataclasses

from gpt import CHAPTERS
from gpt.kernels.quantization import DType
from gpt.summary import count_parameters
from serving.engine.async_engine import AsyncEngine, UnavailableError
from serving.http.protocol import APIError
from tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A served run: its engine, its tokenizer and what /v1/models says about it."""

    name: str
    """The request field `model`."""
    engine: AsyncEngine
    tokenizer: Tokenizer
    created: int
    """Unix time of the weights."""
    is_translation: bool = False
    """Whether prompts are source sentences to translate."""
    dtype: DType = "float32"
    num_parameters: int | None = None
    """Trained parameters; counted in the model when None, which works only before quantization."""
    bits_per_byte: float | None = None
    """The run's final score on its test or validation data."""
    run: str | None = None
    """The run's name in the runs folder; None if it is elsewhere."""

    @property
    def decoder_start_token(self) -> int | None:
        """The token that starts a translation; None for models that continue the prompt."""
        return self.tokenizer.eos_token if self.is_translation else None

    @property
    def max_model_len(self) -> int | None:
        """Maximum number of prompt and output tokens of a sequence; None if unlimited."""
        return self.engine.engine.max_model_len

    def max_prompt_length(self, max_tokens: int) -> int | None:
        """Return how long a prompt may be that leaves room for `max_tokens`; None if unlimited.

        The last output token takes no position; in a translation, the start token takes one.
        """
        model = self.engine.engine.model
        if self.is_translation and model.max_target_length(model.context_length) != 0:
            return model.context_length  # of the encoder alone
        if self.max_model_len is None:
            return None
        return self.max_model_len - max(max_tokens, 1) + (not self.is_translation)

    def describe(self) -> dict[str, object]:
        """Return OpenAI's model object with further fields."""
        model = self.engine.engine.model
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tinygpt",
            "max_model_len": self.max_model_len,
            "rung": next(name for name, cls in CHAPTERS.items() if cls is type(model)),
            **{key: getattr(model, key) for key in ("chapter", "year", "paper", "idea")},
            "parameters": self.num_parameters or count_parameters(model),
            "vocab_size": model.vocab_size,
            "eos_token_id": self.tokenizer.eos_token,
            "dtype": self.dtype,
            "translates": self.is_translation,
            "bits_per_byte": self.bits_per_byte,
            "run": self.run,
        }


class ModelRegistry:
    """The served models by name; the first is the default. Models may be added while it serves."""

    def __init__(self) -> None:
        self.entries: dict[str, ModelEntry] = {}
        self.loading_message = "the server is loading its models"
        """Why models are missing; empty once all are loaded."""

    @property
    def is_healthy(self) -> bool:
        """False once an engine has stalled or failed."""
        engines = [entry.engine for entry in self.entries.values()]
        return not any(engine.is_stalled or engine.has_failed for engine in engines)

    async def add(self, entry: ModelEntry) -> None:
        """Start a model's engine and serve it."""
        await entry.engine.start()
        self.entries[entry.name] = entry

    async def close(self) -> None:
        """Stop the engines; sequences that still run end with an error."""
        for entry in self.entries.values():
            await entry.engine.close()

    def get(self, name: str | None) -> ModelEntry:
        """Return the model of that name, or the default one.

        Raises:
            UnavailableError: It is unknown while models are still loading.
            APIError: It is unknown.
        """
        if name is None and self.entries:
            return next(iter(self.entries.values()))
        if name in self.entries:
            return self.entries[name]
        if self.loading_message:
            raise UnavailableError(self.loading_message)
        names = ", ".join(self.entries)
        message = f"no model named {(name or '')[:80]!r}; available: {names}"
        raise APIError(404, message, "model", "model_not_found")

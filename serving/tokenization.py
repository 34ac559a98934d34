"""Between text and token ids: prompts in; whole characters out, up to a stop string."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from tokenizer import END_OF_TEXT, Tokenizer


class PromptTokens(NamedTuple):
    """A tokenized prompt."""

    ids: list[int]
    trailing_space: str = ""
    """A space that ended the text and is not among the ids: the first output token starts with it."""
    allowed_first_tokens: Sequence[int] = ()
    """Tokens that may start the output; any, if empty."""
    text: str = ""
    """The text that was tokenized."""
    eos_prepended: bool = False
    """Whether the first id is an EOS token that is not in the text."""


def tokenize_prompt(tokenizer: Tokenizer, text: str) -> PromptTokens:
    """Tokenize a text to continue; it starts with an EOS token, as every document in training does.

    A trailing space is part of the next word's token, both for the tokenizer and for the model,
    which has hardly ever seen one alone: it is removed, and the first output token must start with it.
    """
    space_tokens = _tokens_starting_with_space(tokenizer) if text.endswith(" ") else ()
    space = " " if len(space_tokens) > 1 else ""
    ids = [tokenizer.eos_token, *tokenizer.encode(text.removesuffix(space))]
    return PromptTokens(ids, space, space_tokens if space else (), text, eos_prepended=True)


def tokenize_source(tokenizer: Tokenizer, text: str) -> PromptTokens:
    """Tokenize a sentence to translate, as in training; a ValueError if it has no tokens.

    The space that the first word of a translation starts with is omitted from the output.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty: expected a sentence to translate")
    return PromptTokens(ids, " ", text=text)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token as text, or as `bytes:\xc3` if it is not whole characters."""
    if token == tokenizer.eos_token:
        return END_OF_TEXT
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@functools.cache
def _tokens_starting_with_space(tokenizer: Tokenizer) -> Sequence[int]:
    ids = range(tokenizer.vocab_size)
    return [token for token in ids if tokenizer.token_bytes(token).startswith(b" ")]


class IncrementalDetokenizer:
    """Decodes the tokens of one sequence as they come, up to the first stop string.

    The results of all `push` calls and of `flush`, joined, are the output. Nothing is ever
    retracted: what may be the start of a character or of a stop string is buffered. The first stop
    string is the one completed first; of two completed by the same character, the longer.

    `omitted_prefix` is removed from the start of the output: the prompt's trailing space.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), omitted_prefix: str = ""
    ) -> None:
        if "" in stop_strings:
            raise ValueError("a stop string is empty: expected at least one character")
        self.stopped = False
        """Whether a stop string has ended the output."""
        self.num_decoded = 0
        """Whole characters decoded so far, buffered ones included."""
        self.num_emitted = 0
        """Characters returned so far."""
        self._stream, self._buffer = tokenizer.stream(), ""
        self._stop_strings, self._omitted_prefix = stop_strings, omitted_prefix

    def push(self, token: int) -> str:
        """Add a token; return the characters that can be emitted."""
        return self._emit(self._stream.push(token))

    def flush(self) -> str:
        """Return the buffered characters, once there are no more tokens."""
        text = self._emit(self._stream.flush())
        self.num_emitted += len(self._buffer)
        text, self._buffer = text + self._buffer, ""
        return text

    def _emit(self, new_text: str) -> str:
        if self.stopped:
            return ""
        new_text = new_text.removeprefix(self._omitted_prefix)
        self._omitted_prefix = ""
        self.num_decoded += len(new_text)
        text = self._buffer + new_text
        matches = [(text.find(stop), len(stop)) for stop in self._stop_strings if stop in text]
        if matches:
            self.stopped, self._buffer = True, ""
            end, _ = min(matches, key=lambda match: (sum(match), match[0]))
        else:
            prefixes = (stop[:n] for stop in self._stop_strings for n in range(1, len(stop)))
            end = len(text) - max(map(len, filter(text.endswith, prefixes)), default=0)
            self._buffer = text[end:]
        self.num_emitted += end
        return text[:end]

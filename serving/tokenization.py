"""Between text and token ids: prompts in; whole characters out, up to a stop string."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizer import Tokenizer


class PromptTokens(NamedTuple):
    """A tokenized prompt."""

    ids: list[int]
    trailing_space: str = ""
    """A space that ended the text and is not among the ids: the first output token starts with it
    (token healing)."""
    allowed_first_tokens: Sequence[int] = ()
    """Tokens that may start the output; any, if empty."""
    text: str = ""
    """The text that was tokenized."""
    eos_prepended: bool = False
    """Whether the first id is an EOS token that is not in the text."""
    incomplete: Sequence[int] = ()
    """The last ids, from which a character may be incomplete that the output completes."""


def tokenize_prompt(
    tokenizer: Tokenizer, text: str, *, prepend_eos: bool = True, heal: bool = True
) -> PromptTokens:
    """Tokenize a text to continue; it starts with an EOS token, as every document in training does.

    A trailing space is part of the next word's token, both for the tokenizer and for the model,
    which has hardly ever seen one alone: with `heal` it is removed, and the first output token must
    start with it.
    """
    space_tokens = _tokens_starting_with_space(tokenizer) if heal and text.endswith(" ") else ()
    space = " " if len(space_tokens) > 1 else ""
    ids = [tokenizer.eos_token] * prepend_eos + tokenizer.encode(text.removesuffix(space))
    return PromptTokens(ids, space, space_tokens if space else (), text, prepend_eos)


def decode_prompt(
    tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool = True
) -> tuple[str, Sequence[int]]:
    """Return the whole characters of token ids, and the last ids, for `PromptTokens.incomplete`."""
    stream, parts = TextStream(tokenizer, skip_special_tokens), []
    incomplete: list[int] = []
    for token in ids:
        if text := stream.push(token):
            parts.append(text)
            incomplete.clear()
        incomplete.append(token)
    return "".join(parts), incomplete


def tokenize_source(tokenizer: Tokenizer, text: str) -> PromptTokens:
    """Tokenize a sentence to translate, as in training; a ValueError if it has no tokens.

    The space that the first word of a translation starts with is omitted from the output.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty: expected a sentence to translate")
    return PromptTokens(ids, " ", text=text)


def token_text(tokenizer: Tokenizer, token: int, *, is_first: bool = False) -> str:
    r"""Return a token as text, a special one by its name, or as `bytes:\xc3` if it is not whole characters.

    `is_first` tells whether it starts a text (see `Tokenizer.token_bytes`).
    """
    if token in tokenizer.special_tokens:
        return tokenizer.special_tokens[token]
    data = tokenizer.token_bytes(token, is_first=is_first)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@functools.cache
def _tokens_starting_with_space(tokenizer: Tokenizer) -> Sequence[int]:
    ids = range(tokenizer.vocab_size)
    return [token for token in ids if tokenizer.token_bytes(token).startswith(b" ")]


class TextStream:
    """Decodes one token at a time into whole characters, special tokens into nothing or their names."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Iterable[int] = ()
    ) -> None:
        self._stream = tokenizer.stream(prompt)
        self._shown_tokens = {} if skip_special_tokens else tokenizer.special_tokens

    @property
    def is_first(self) -> bool:
        """Whether the next token starts the text."""
        return self._stream.is_first

    def push(self, token: int) -> str:
        """Return the characters that this token completes; '' while a character is incomplete."""
        if token in self._shown_tokens:
            return self._stream.flush() + self._shown_tokens[token]
        return self._stream.push(token)

    def flush(self) -> str:
        """Return an incomplete last character as U+FFFD."""
        return self._stream.flush()


class IncrementalDetokenizer:
    """Decodes the tokens of one sequence as they come, up to the first stop string.

    The results of all `push` calls and of `flush`, joined, are the output. Nothing is ever
    retracted: what may be the start of a character or of a stop string is buffered. The first stop
    string is the one completed first; of two completed by the same character, the longer.

    Args:
        tokenizer: The tokenizer.
        stop_strings: The stop strings.
        omitted_prefix: Removed from the start of the output: the prompt's trailing space.
        prompt: The tokens that the output continues.
        incomplete: The last of them, if the output completes their last character.
        min_tokens: Number of first tokens that complete no stop string.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        omitted_prefix: str = "",
        *,
        prompt: Iterable[int] = (),
        incomplete: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        if "" in stop_strings:
            raise ValueError("a stop string is empty: expected at least one character")
        self.stopped = False
        """Whether a stop string has ended the output."""
        self.num_decoded = 0
        """Whole characters decoded so far, buffered ones included."""
        self.num_emitted = 0
        """Characters returned so far."""
        self._stream, self._buffer = TextStream(tokenizer, skip_special_tokens, prompt), ""
        self._stop_strings, self._omitted_prefix = stop_strings, omitted_prefix
        self._min_tokens, self._num_tokens = min_tokens, 0
        for token in incomplete:
            self._stream.push(token)

    @property
    def is_first(self) -> bool:
        """Whether the next token starts a text that no prompt has begun."""
        return self._stream.is_first

    def push(self, token: int) -> str:
        """Add a token; return the characters that can be emitted."""
        self._num_tokens += 1
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
        text, matches = self._buffer + new_text, []
        if self._num_tokens > self._min_tokens:
            for stop in self._stop_strings:
                # A stop string that was completed before min_tokens may be in the buffer.
                start = text.find(stop, max(0, len(self._buffer) + 1 - len(stop)))
                if start >= 0:
                    matches.append((start, len(stop)))
        if matches:
            self.stopped, self._buffer = True, ""
            end, _ = min(matches, key=lambda match: (sum(match), match[0]))
        else:
            prefixes = (stop[:n] for stop in self._stop_strings for n in range(1, len(stop)))
            end = len(text) - max(map(len, filter(text.endswith, prefixes)), default=0)
            self._buffer = text[end:]
        self.num_emitted += end
        return text[:end]

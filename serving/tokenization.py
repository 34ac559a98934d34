"""Between text and token ids, as a reader sees it: prompts in; whole characters out, up to a stop string."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from tokenizer import END_OF_TEXT, Tokenizer


class PromptTokens(NamedTuple):
    """What to continue: tokens, and the space after them that the next token is to begin with."""

    ids: list[int]
    space: str = ""
    allowed_first_tokens: Sequence[int] = ()
    """The tokens to choose the first one from, where there is a choice to be made."""
    text: str = ""
    """What the tokens were read from."""
    begins: bool = False
    """Whether the first token is the end-of-text before a document, which is in no text."""


def tokenize_prompt(tokenizer: Tokenizer, text: str) -> PromptTokens:
    """The tokens to continue `text` from: like every document in training, it begins with end-of-text.

    A space at the end is part of the word that follows, to the tokenizer and so to the model,
    which has hardly ever seen one alone. It is left to the first token, and not given twice.
    """
    spaced = _beginning_with_space(tokenizer) if text.endswith(" ") else ()
    space = " " if len(spaced) > 1 else ""
    ids = tokenizer.encode(text.removesuffix(space))
    return PromptTokens(
        [tokenizer.eos_token, *ids], space, spaced if space else (), text, begins=True
    )


def tokenize_source(tokenizer: Tokenizer, text: str) -> PromptTokens:
    """The tokens of a sentence to translate, as in training; a ValueError if there are none.

    A translation's first word has a space before it, which is left out.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty: expected a sentence to translate")
    return PromptTokens(ids, " ", text=text)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token for people to read: its text, or its bytes where they are only a part of a character."""
    if token == tokenizer.eos_token:
        return END_OF_TEXT
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@functools.cache
def _beginning_with_space(tokenizer: Tokenizer) -> Sequence[int]:
    ids = range(tokenizer.vocab_size)
    return [token for token in ids if tokenizer.token_bytes(token).startswith(b" ")]


class IncrementalDetokenizer:
    """The text of one request as its tokens come, cut before the first stop string.

    All the pushes and the flush, joined, are the text. What a push gives is never taken
    back: it holds back what may be the beginning of a character or of a stop string. The
    first stop string is the one that is complete first; of two at once, the longer.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), space: str = "") -> None:
        if "" in stops:
            raise ValueError("a stop string is empty: expected at least one character")
        self.stopped = False
        self.seen = 0
        """Characters of the tokens so far, of those that are whole."""
        self.sure = 0
        """Characters of the text that have been given."""
        self._stream = tokenizer.stream()
        self._stops = stops
        self._space = space  # of the prompt: the first token repeats it
        self._held = ""

    def push(self, token: int) -> str:
        """The characters that this token makes certain."""
        return self._pass(self._stream.push(token))

    def flush(self) -> str:
        """What was held back, once no token will follow."""
        text = self._pass(self._stream.flush())
        self.sure += len(self._held)
        text, self._held = text + self._held, ""
        return text

    def _pass(self, new: str) -> str:
        if self.stopped:
            return ""
        new = new.removeprefix(self._space)
        self._space = ""
        self.seen += len(new)
        text = self._held + new
        found = [(text.find(stop), len(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            sure, _ = min(found, key=lambda match: (sum(match), match[0]))
        else:
            sure = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[sure:]
        self.sure += sure
        return text[:sure]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

"""The command `nearest`: the words with the most similar vectors."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from gpt.checkpoint import find_run, load_model
from gpt.embeddings import nearest_tokens
from training.run_directory import load_run_tokenizer


@dataclass(frozen=True)
class Nearest:
    """List the tokens whose vectors in a run's embedding are most similar to that of a word."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run of word2vec or of a language model: a name in runs/, or a path."""
    word: Annotated[Positional[str], arg(metavar="WORD")]
    """Word; a token with a space before it is tried first, as in the middle of a text."""
    k: int = 10
    """Number of tokens to list."""

    def __call__(self) -> None:
        """Print each token's cosine and text."""
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, not {self.k}")
        run = find_run(self.run)
        model, tokenizer = load_model(run), load_run_tokenizer(run)
        if not tokenizer:
            raise ValueError(f"{run}: the run has no tokenizer, and so no words")
        for token, cosine in nearest_tokens(model, tokenizer.word_token(self.word), self.k):
            text = tokenizer.token_bytes(token).decode(errors="backslashreplace")
            print(f"{cosine:6.3f}  {text!r}")

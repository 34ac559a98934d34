"""Chapter 15: today's GPT."""

from collections.abc import Iterator


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = ()

"""Chapter 12: look back at every encoder state."""

from collections.abc import Iterator


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = ()

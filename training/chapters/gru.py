"""Chapter 10: two gates, one memory."""

from collections.abc import Iterator


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = ()

"""Chapter 11: one network reads, one writes."""

from collections.abc import Iterator


def examples() -> Iterator[str]:
    """Yield the worked examples of the chapter, line by line."""
    yield from ()


FIGURES = ()

"""`python -m gpt chapters` lists the models."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt import cli, summary


@dataclass(frozen=True)
class Chapters:
    """List the models in the order of the chapters."""

    def __call__(self) -> None:
        """Print the table."""
        print(summary.chapters_table())


def main(prog: str = "python -m gpt", arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    cli.main(prog, "The models.", {"chapters": Chapters}, arguments)


if __name__ == "__main__":
    main()

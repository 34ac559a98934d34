"""`python -m gpt chapters` lists the models."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt import CHAPTERS, cli, summary


@dataclass(frozen=True)
class Chapters:
    """List the models in the order of the chapters."""

    def __call__(self) -> None:
        """Print a table of the models with their years, sizes, tasks, ideas and papers."""
        print(f"{'':>2}  {'name':<12}{'year':<6}{'parameters':>11}  {'tasks':<23}idea, paper")
        for name, model in CHAPTERS.items():
            size = summary.count_parameters(summary.build_on_meta(model))
            tasks = ", ".join(model.supported_tasks)
            print(
                f"{model.chapter:>2}  {name:<12}{model.year:<6}{size:>11,}  {tasks:<23}{model.idea}"
            )
            print(f"{'':>56}  {model.paper}")


def main(prog: str = "python -m gpt", arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    cli.main(prog, "The models.", {"chapters": Chapters}, arguments)


if __name__ == "__main__":
    main()

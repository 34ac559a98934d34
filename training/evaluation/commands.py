"""The commands that evaluate: `eval`, `translators` and `ladder`."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from gpt import cli
from gpt.checkpoint import RUNS, find_run, load_model, read_json, write_atomically
from gpt.cli import OptionalInt, OptionalText
from gpt.device import resolve_device
from gpt.summary import count_parameters
from training.config import TrainingConfig
from training.data.mixture import prepared_source
from training.evaluation.ladder import format_table, run_ladder
from training.launch import train_or_exit
from training.progress import read_metrics
from training.run_directory import load_run_tokenizer, load_training_config
from training.tasks import TASKS, open_task
from training.tasks.base import Task, refuse_text_option
from training.tasks.translation import comparison_table


@dataclass(frozen=True)
class Eval:
    """Evaluate a run on a text: loss, perplexity and bits per byte; every token is scored once."""

    run: cli.OptionalRun = None
    """Run: a name in runs/, or a path. Default: the newest under runs/."""
    data: OptionalText = None
    """Text to score, as in `train --data`. Default: the run's own corpus."""
    data_config: OptionalText = None
    """Configuration of a hub dataset that has several."""
    data_limit: OptionalInt = None
    """Read at most this many bytes of text."""
    text_column: OptionalText = None
    """Column that holds the text."""
    streaming: bool = False
    """Read a hub dataset without storing a copy of its text."""
    split: OptionalText = None
    """Split to score. Default: validation of the run's own corpus; of other data the first of test, validation, train."""
    stride: OptionalInt = None
    """Tokens that each window scores. Default: as many as the model predicts. A smaller stride is slower and gives every token more context."""
    context_length: OptionalInt = None
    """Tokens of a window. Default: the model's context length."""
    num_beams: OptionalInt = None
    """Beam search width of translations. Default: 1, greedy."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of matrix products. In float32 a score is the same on every machine and equals the server's; auto is that of `train`."""
    json: bool = False
    """Print one JSON object."""

    def __call__(self) -> None:
        """Evaluate and print."""
        directory = find_run(self.run)
        model = load_model(directory, resolve_device(self.device))
        config = dataclasses.replace(load_training_config(directory), precision=self.precision)
        names = ("data_config", "text_column", "data_limit", "streaming")
        data_options = {name: getattr(self, name) for name in names}
        if self.data is not None:
            config = dataclasses.replace(
                config, data=self.data, data_split=None, shuffle_buffer=None, **data_options
            )
        elif not config.data:
            raise ValueError(
                f"{directory} was imported and has no corpus of its own: give --data, the text to score"
            )
        elif any(data_options.values()):
            raise ValueError(
                "options about the data need --data: without it, the run's own corpus is scored"
            )
        if self.data is not None and (prepared := prepared_source(self.data)):
            for name in filter(data_options.get, names):
                refuse_text_option(prepared, name)
        task = open_task(config, load_run_tokenizer(directory), for_training=self.data is None)
        if self.data is None and task.tokenizer:
            _check_same_data(directory, config, task)
        preferred = ("test", "validation", "train") if self.data else ("validation",)
        split = self.split or next((s for s in preferred if s in task.splits), task.splits[0])
        if split not in task.splits:
            raise ValueError(f"no split is named {split!r}; there are {', '.join(task.splits)}")
        eval_names = ("stride", "context_length", "num_beams")
        options = {name: value for name in eval_names if (value := getattr(self, name)) is not None}
        for name in options.keys() - task.eval_options:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} has no meaning in the task {config.task}: leave it out")
        report = task.score(model, split, final=True, **options)
        if self.json:
            source = {"run": str(directory), "data": task.description, "split": split}
            print(json.dumps({**source, **report.to_json()}))
            return
        print(f"{directory} on the {split} split of {task.description}")
        print(report.table())


def _check_same_data(directory: Path, config: TrainingConfig, task: Task) -> None:
    """Raise a ValueError if a run's corpus is not what it was when the run was trained on it."""
    trained_on = read_json(directory / "run.json").get("data", {}).get("fingerprint")
    if trained_on != task.fingerprint:
        raise ValueError(
            f"{config.data} has changed since {directory} was trained on it, and its validation "
            f"split may now hold text of the training: to score it all the same, add --data {config.data}"
        )


@dataclass(frozen=True)
class Translators:
    """Compare translation runs: a table and a plot of BLEU by sentence length."""

    run: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN …", help_behavior_hint="")]
    """Runs: names in runs/, or paths."""
    split: str = "test"
    """Split to translate."""
    num_beams: int = 1
    """Beam search width; 1 is greedy."""
    output: Path = Path("bleu.svg")
    """File of the plot: .svg, .png or .pdf; the table and a .json are written beside it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Translate, score, write."""
        from training.plots import curves
        from training.plots.style import check_output

        if not self.run:
            raise ValueError("which runs? `translators RUN [RUN …]`")
        check_output(self.output)
        rows = []
        for directory in map(find_run, self.run):
            config = load_training_config(directory)
            if TASKS[config.task].kind != "translation":
                raise ValueError(f"{directory}: not a translation run: its task is {config.task}")
            task = open_task(config, load_run_tokenizer(directory))
            if self.split not in task.splits:
                raise ValueError(
                    f"{config.data} has no split named {self.split!r}; there are {', '.join(task.splits)}"
                )
            model = load_model(directory, resolve_device(self.device))
            score = task.score(model, self.split, num_beams=self.num_beams)
            row = {
                "run": directory.name,
                "model": config.model,
                "split": self.split,
                "parameters": count_parameters(model),
                "seconds": max(
                    (line.get("seconds", 0.0) for line in read_metrics(directory)), default=0.0
                ),
                **score.to_json(),
            }
            rows.append(row)
            print(f"{directory}: BLEU {row['bleu']:.2f}", flush=True)
        write_atomically(self.output.with_suffix(".json"), json.dumps(rows, indent=2) + "\n")
        table = comparison_table(rows)
        write_atomically(self.output.with_suffix(".md"), table)
        curves.plot_bleu(rows, self.output)
        print(f"\n{table}\n{self.output}")


@dataclass(frozen=True)
class Ladder:
    """Train every language model on one corpus under one budget, and compare them: table and plot."""

    rungs: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[RUNG …]", help_behavior_hint="")
    ] = ()
    """Models to train. Default: all."""
    data: str = TrainingConfig.data
    """Corpus, as in `train`."""
    tokenizer: str = TrainingConfig.tokenizer
    """Tokenizer, as in `train`."""
    vocab_size: int = TrainingConfig.vocab_size
    """Number of tokens that the tokenizer learns."""
    tokens: int = 240 * TrainingConfig.batch_size * TrainingConfig.context_length
    """Tokens that each model is trained on."""
    seconds: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Seconds that each model is trained for, instead of `--tokens`."""
    output: Path = RUNS / "ladder"
    """Folder of the runs, ladder.json, ladder.md and ladder.svg; an unfinished ladder is resumed."""
    seed: int = TrainingConfig.seed
    """Seed of every run."""
    device: str = TrainingConfig.device
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Train, score, write."""
        from training.plots.curves import plot_ladder

        if self.tokens < 1 or (self.seconds is not None and not 0 < self.seconds < math.inf):
            raise ValueError("--tokens must be at least 1, and --seconds above 0")
        names = ("data", "tokenizer", "vocab_size", "seed", "device")
        config_fields = {name: getattr(self, name) for name in names}
        rows = run_ladder(
            self.output, self.rungs, config_fields, self.tokens, self.seconds, train_or_exit
        )
        write_atomically(self.output / "ladder.json", json.dumps(rows, indent=2) + "\n")
        table = format_table(rows)
        write_atomically(self.output / "ladder.md", table)
        plot_ladder(rows, self.output / "ladder.svg")
        print(f"\n{table}\n{self.output / 'ladder.svg'}")

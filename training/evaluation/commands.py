"""The commands that evaluate: `eval`, `compare`, `translators` and `ladder`."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from gpt import cli
from gpt.checkpoint import RUNS, find_run, load_model, read_json, write_atomically
from gpt.cli import OptionalFloat, OptionalInt, OptionalPath, OptionalText
from gpt.device import resolve_device
from gpt.summary import count_parameters
from training.config import TrainingConfig
from training.data.mixture import prepared_source
from training.evaluation.analysis import MIN_BLOCK_SIZE, PairedSums
from training.evaluation.ladder import find_leaks, format_table, run_ladder
from training.launch import train_or_exit
from training.progress import read_metrics
from training.run_directory import load_run_tokenizer, load_training_config
from training.tasks import TASKS, open_task
from training.tasks.base import Task, refuse_text_option
from training.tasks.text import Text
from training.tasks.translation import comparison_table

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Texts = Annotated[tuple[str, ...], arg(metavar="TEXT …", help_behavior_hint="")]


@dataclass(frozen=True)
class Eval:
    """Evaluate a run on texts; every token is scored once.

    With nll for the sum of -ln p(token | tokens before it) over all tokens of a text:
    - loss = nll / tokens
    - perplexity = exp(loss): comparable only under the same tokenizer
    - word perplexity = exp(nll / words): comparable under every tokenizer
    - bits per byte = nll / (ln 2 * bytes): comparable under every tokenizer
    - tokens: all but the first of a split, which is <|endoftext|> and context only
    - words, bytes: of the text itself; words stand between white space, and line ends are words
    - [low, high]: 95% interval, by a bootstrap over documents (fewer than 10: over blocks of text)
    """

    run: cli.OptionalRun = None
    """Run: a name in runs/, or a path. Default: the newest under runs/."""
    data: Texts = ()
    """Texts to score, each as in `train --data`. Default: the run's own corpus."""
    data_config: OptionalText = None
    """Configuration of a hub dataset that has several."""
    data_revision: OptionalText = None
    """Branch, tag or commit of a hub dataset."""
    data_limit: OptionalInt = None
    """Read at most this many bytes of text."""
    text_column: OptionalText = None
    """Column that holds the text."""
    streaming: bool = False
    """Read a hub dataset without storing a copy of its text."""
    split: Texts = ()
    """Splits to score. Default: validation of the run's own corpus; of other data the first of test, validation, train."""
    stride: OptionalInt = None
    """Tokens that each window scores. Default: as many as the model predicts. A smaller stride is slower and gives every token more context."""
    context_length: OptionalInt = None
    """Tokens of a window. Default: the model's context length."""
    num_beams: OptionalInt = None
    """Beam search width of translations. Default: 1, greedy."""
    length_penalty: OptionalFloat = None
    """Power of the length that divides the score of a beam search's hypothesis. Default: 1, the mean; less prefers shorter translations."""
    by: Annotated[
        tuple[Literal["position", "document"], ...],
        arg(metavar="{position,document}", help_behavior_hint=""),
    ] = ()
    """Add the loss by position (by how many tokens of context a token had), by document, or by both."""
    accuracy: bool = False
    """Add how often the target is the likeliest token (accuracy@1; a tie is a miss) or among the five likeliest (accuracy@5), and the expected calibration error over 15 bins."""
    output: OptionalPath = None
    """File of a plot of --by position and --accuracy: .svg, .png or .pdf."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "float32"
    """Precision of matrix products. In float32 a score is the same on every machine and equals the server's; auto is that of `train`."""
    json: bool = False
    """Print one JSON object, or a list of them for several texts or splits."""
    markdown: bool = False
    """Print a Markdown table with a row for each text and split."""

    def __call__(self) -> None:
        """Evaluate and print."""
        if self.json and self.markdown:
            raise ValueError("give --json or --markdown, not both")
        if self.output:
            self._check_plot(self.output)
        directory = find_run(self.run)
        model = load_model(directory, resolve_device(self.device))
        names = ("data_config", "data_revision", "text_column", "data_limit", "streaming")
        data_options = {name: getattr(self, name) for name in names}
        if not self.data and any(data_options.values()):
            raise ValueError(
                "options about the data need --data: without it, the run's own corpus is scored"
            )
        tasks = [
            open_data(directory, data, self.precision, data_options) for data in self.data or [None]
        ]
        jobs = [
            (task, split)
            for task in tasks
            for split in choose_splits(task, self.split, own_corpus=not self.data)
        ]
        option_names = ("stride", "context_length", "num_beams", "length_penalty", "by", "accuracy")
        options = score_options(self, tasks[0], *option_names)
        print_lines = not (self.json or self.markdown)
        rows = []
        for task, split in jobs:
            report = task.score(model, split, final=True, **options)
            source = {"run": str(directory), "data": task.description, "split": split}
            rows.append({**source, **report.to_json()})
            if print_lines:
                print(f"{directory} on the {split} split of {task.description}")
                print(report.table(), flush=True)
        if self.json:
            print(json.dumps(rows if len(rows) > 1 else rows[0]))
        if self.markdown:
            print(markdown_table([markdown_row(row) for row in rows]))
        if self.output:
            from training.plots.evaluation import plot_evaluation

            plot_evaluation(rows, self.output)
            if print_lines:
                print(self.output)

    def _check_plot(self, output: Path) -> None:
        """Raise a ValueError if there is nothing to draw, or not in this format."""
        from training.plots.style import check_output

        check_output(output)
        if "position" not in self.by and not self.accuracy:
            raise ValueError(
                "--output draws --by position and --accuracy: give one of them, or both"
            )


def markdown_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a row of JSON that are single numbers or texts, with their intervals."""
    cells = {name: value for name, value in row.items() if isinstance(value, int | float | str)}
    for name, (low, high) in row.get("intervals", {}).items():
        cells[name] = f"{cells[name]:.4f} [{low:.4f}, {high:.4f}]"
    return cells


def open_data(
    directory: Path, data: str | None, precision: Precision, data_options: dict[str, Any]
) -> Task:
    """Open a text, or a run's own corpus if None, as the task of the run, to be scored by its model."""
    config = dataclasses.replace(load_training_config(directory), precision=precision)
    if data is not None:
        if prepared := prepared_source(data):
            for name in filter(data_options.get, data_options):
                refuse_text_option(prepared, name)
        config = dataclasses.replace(
            config,
            data=data,
            data_split=None,
            shuffle_buffer=None,
            drop_duplicates=False,
            **data_options,
        )
    elif not config.data:
        raise ValueError(
            f"{directory} was imported and has no corpus of its own: give --data, the text to score"
        )
    task = open_task(config, load_run_tokenizer(directory), for_training=data is None)
    if data is None and task.tokenizer:
        _check_same_data(directory, config, task)
    return task


def open_text(directory: Path, data: str | None, verb: str) -> Text:
    """Open one text, or a run's own, for a command that takes only runs of the task text."""
    name = load_training_config(directory).task
    if TASKS[name].kind != "text":
        raise ValueError(f"{directory}: its task is {name}, and `{verb}` is for the task text")
    task = open_data(directory, data, "float32", {})
    assert isinstance(task, Text)
    if task.is_mixture:
        raise ValueError(f"{verb} scores one text: give one source of the mixture as --data")
    return task


def choose_splits(task: Task, names: Sequence[str], own_corpus: bool) -> Sequence[str]:
    """Return the named splits, which must exist, or the one that is scored by default."""
    for name in names:
        if name not in task.splits:
            there = ", ".join(task.splits)
            raise ValueError(f"no split is named {name!r}; there are {there}")
    preferred = ("validation",) if own_corpus else ("test", "validation", "train")
    return names or [next((s for s in preferred if s in task.splits), task.splits[0])]


def score_options(command: "Eval | Compare", task: Task, *names: str) -> dict[str, Any]:
    """Return those of the named options that were given; the task must know them."""
    values = {name: getattr(command, name) for name in names}
    # Not those that equal False: a stride of 0 is given, and refused.
    options = {k: v for k, v in values.items() if v not in (None, ()) and v is not False}
    for name in options.keys() - task.eval_options:
        option = name.replace("_", "-")
        raise ValueError(f"--{option} has no meaning in the task {task.config.task}: leave it out")
    return options


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the rows' numbers and texts, in the columns of all rows."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    is_number = [any(isinstance(row.get(name), int | float) for row in rows) for name in names]
    lines = [[name.replace("_", " ") for name in names]]
    lines.append(["---:" if number else "---" for number in is_number])
    lines += [[_cell(row.get(name, "")) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _check_same_data(directory: Path, config: TrainingConfig, task: Task) -> None:
    """Raise a ValueError if a run's corpus is not what it was when the run was trained on it."""
    trained_on = read_json(directory / "run.json").get("data", {}).get("fingerprint")
    if trained_on != task.fingerprint:
        raise ValueError(
            f"{config.data} has changed since {directory} was trained on it, and its validation "
            f"split may now hold text of the training: to score it all the same, add --data {config.data}"
        )


@dataclass(frozen=True)
class Compare:
    """Compare runs with the first of them on the same text: paired, with a significance test.

    - difference: in bits per byte, so that tokenizers may differ; below 0, a run is better
    - interval: 95%, by a bootstrap over documents (fewer than 10: over blocks of text)
    - p: of a two-sided sign-flip test, the chance of such a difference between equally good runs
    """

    run: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN RUN …", help_behavior_hint="")]
    """Runs: names in runs/, or paths."""
    data: OptionalText = None
    """Text to score, as in `train --data`. Default: the runs' own corpus."""
    split: OptionalText = None
    """Split to score. Default: as in `eval`."""
    stride: OptionalInt = None
    """Tokens that each window scores. Default: as many as the model predicts."""
    context_length: OptionalInt = None
    """Tokens of a window. Default: each model's context length."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    json: bool = False
    """Print a list of JSON objects."""

    def __call__(self) -> None:
        """Score each run, and print the table."""
        if len(self.run) < 2:
            raise ValueError("compare which runs? Two at least: `compare RUN RUN [RUN …]`")
        directories = [find_run(run) for run in self.run]
        tasks = [open_text(directory, self.data, "compare") for directory in directories]
        splits = (self.split,) if self.split else ()
        [split] = choose_splits(tasks[0], splits, own_corpus=self.data is None)
        splits_of_runs = [task.split_of(task.parts[0], split) for task in tasks]
        texts = [task.scored_text(data) for task, data in zip(tasks, splits_of_runs, strict=True)]
        digests = [text.digest() for text in texts]
        for directory, digest in zip(directories, digests, strict=True):
            if digest != digests[0]:
                raise ValueError(
                    f"{directory} and {directories[0]} have other texts in their {split} split, or a "
                    "tokenizer that loses some of it: give one text that both hold as --data"
                )
        if texts[0].units().num_units < 2:
            raise ValueError(
                f"the {split} split of {tasks[0].description} is too short to compare runs on: "
                f"give more than {MIN_BLOCK_SIZE} {texts[0].size_unit}"
            )
        rows: list[dict[str, Any]] = []
        baseline: PairedSums | None = None
        for directory, task, data, text in zip(
            directories, tasks, splits_of_runs, texts, strict=True
        ):
            model = load_model(directory, resolve_device(self.device))
            options = score_options(self, task, "stride", "context_length")
            predictions = task.predictions(model, data, **options)
            if not np.isfinite(predictions.nll_N).all():
                raise ValueError(
                    f"{directory}: its loss is not finite: there is nothing to compare"
                )
            sums = PairedSums(text, predictions.nll_N)
            baseline = baseline or sums
            rows.append(
                {
                    "run": str(directory),
                    "model": task.config.model,
                    "parameters": count_parameters(model),
                    "context_length": predictions.context_length,
                    "stride": predictions.stride,
                    "loss": float(predictions.nll_N.mean()),
                    **sums.figures(),
                    **(sums.difference(baseline) if rows else {}),
                }
            )
        if self.json:
            print(json.dumps(rows))
            return
        for row in rows[1:]:
            row["difference"] = f"{row['difference']:+.4f}"
            row["interval"] = "[{:+.4f}, {:+.4f}]".format(*row["interval"])
        print(markdown_table(rows))
        print(
            f"\nThe {split} split of {tasks[0].description}. Differences from {directories[0]} in "
            f"{sums.unit}; 95% intervals and p over {sums.description}."
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
class LmEval:
    """Run tasks of EleutherAI's evaluation harness on a run: `lm-eval --model_args run=RUN --tasks TASK`.

    The options are those of `lm-eval run --model tinygpt`; `lm-eval run --help` lists them. They go
    to the harness unread, which is an extra: pip install -e '.[clients]'.
    """

    def __call__(self) -> None:
        """Run it without options: it needs some."""
        raise ValueError("which tasks? `lm-eval --model_args run=RUN --tasks TASK`")


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run the harness with the options that were typed."""
    try:
        from training.evaluation.harness import run_harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError("lm-eval is not installed: pip install -e '.[clients]'") from None
    run_harness(arguments)


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
        if leaks := find_leaks(rows):
            raise ValueError(
                f"{', '.join(leaks)}: below the truth by more than chance, which no model can be: it "
                "has seen what it predicts"
            )

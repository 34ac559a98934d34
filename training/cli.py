"""`python -m training`: train a model on a text, continue a run, score it."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from gpt import CHAPTERS, Model, cli, summary
from gpt.checkpoint import (
    MODEL_CLASSES,
    RUNS,
    build_model,
    did_you_mean,
    find_run,
    load_model,
    read_json,
    write_atomically,
)
from gpt.cli import MaybeInt, MaybePath, MaybeText
from gpt.device import device_name, resolve_device
from gpt.summary import count_parameters
from training import distributed
from training.config import TrainingConfig, model_options, new_model, resolve_config
from training.evaluation import ladder
from training.plots import figures
from training.plots.commands import Xray
from training.presets import PRESETS, get_preset
from training.progress import format_duration
from training.run_directory import (
    create_run,
    is_same_run,
    load_run_tokenizer,
    load_training_config,
    resume_run,
)
from training.tasks import TASKS, check, open_task
from training.tasks.translation import comparison
from training.trainer import (
    Diverged,
    Stopped,
    Trainer,
)

PROG = "python -m training"
DEFAULT_PRESET = {"cuda": "gpt-micro"}
"""By device; gpt-nano on all others."""


def train_command(name: str) -> Callable[..., cli.Command]:
    """The `train` command with the options of preset `name`, its values as their defaults."""
    chosen = get_preset(name)
    options: Any = model_options(chosen)

    def train(
        settings: TrainingConfig = chosen,
        model: options = options(),  # noqa: B008 (frozen)
        run: MaybePath = None,
    ) -> cli.Command:
        """Train a model: `train [PRESET] [options]`, or `train --resume [RUN]` to go on.

        `tinygpt presets` lists the presets.

        Args:
            settings: What to train on, and how.
            model: The model's own arguments.
            run: Where to write the run; runs/<preset>-<time> when not given.
        """
        return lambda: start(resolve_config(settings, model, chosen), run)

    return train


def plan_command(name: str) -> Callable[..., cli.Command]:
    """The `plan` command with the options of preset `name`, as `train` has them."""
    chosen = get_preset(name)
    options: Any = model_options(chosen)

    def plan(
        settings: TrainingConfig = chosen,
        model: options = options(),  # noqa: B008 (frozen)
        gpus: int = 1,
        card: MaybeText = None,
        mfu: float = 0.4,
        json: bool = False,
    ) -> cli.Command:
        """Say what a run will take before it is trained: `plan [PRESET] [options as in train] --num-gpus N`.

        Memory of each card by kind, tokens, operations, tokens per second and time.

        Args:
            settings: What to train on, and how.
            model: The model's own arguments.
            gpus: Cards, a process on each.
            card: Name of the cards: H100, A100 80GB, …; this machine's own when not given.
            mfu: Share of the card's peak that is expected to be reached.
            json: Print one JSON object, for machines.
        """
        return lambda: show_plan(
            resolve_config(settings, model, chosen), gpus, card, mfu, as_json=json
        )

    return plan


@dataclass(frozen=True)
class Presets:
    """List the presets: what each trains, and on what."""

    def __call__(self) -> None:
        """Print the table."""
        print(f"{'preset':<24}{'model':<18}{'task':<16}steps")
        for name, run in PRESETS.items():
            print(f"{name:<24}{run.model:<18}{run.task:<16}{run.steps:,}")


@dataclass(frozen=True)
class Describe:
    """Count a model's weights by kind, from its shapes, with no memory spent."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|PRESET|RUN|gpt3")]
    """A model's name (at nano size), a preset of `tinygpt train`, a run directory, or gpt3."""

    def __call__(self) -> None:
        """Print the table."""
        print(summary.describe(self.shapes()))

    def shapes(self) -> Model:
        """What was named, without its weights; a ValueError says what can be."""
        config = Path(self.model) / "config.json"
        if self.model == "gpt3":
            return summary.build_gpt3()
        if self.model in MODEL_CLASSES:
            return summary.build_on_meta(MODEL_CLASSES[self.model])
        if self.model in PRESETS:
            run = PRESETS[self.model]
            expected = TASKS[run.task].expected_model_args(run)
            with torch.device("meta"):
                return new_model(run, expected)
        if config.is_file():
            given = read_json(config)
            with torch.device("meta"):
                return build_model(given["model"], given["model_args"])
        presets = [name for name in PRESETS if name not in MODEL_CLASSES]
        raise ValueError(
            f"{self.model!r} is neither a model nor a preset"
            f"{did_you_mean(self.model, [*MODEL_CLASSES, *PRESETS])} nor a run directory; "
            f"the models are {', '.join(CHAPTERS)}, gpt3; further presets {', '.join(presets)}"
        )


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest checkpoint, exactly as if it had not been stopped."""

    run: cli.MaybeRun = None
    """The run directory; the newest under runs/ when not given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Train on."""
        world = distributed.init_process_group(self.device)
        go_on(world.broadcast(find_run(self.run, "run.json")), self.device, world)


@dataclass(frozen=True)
class Eval:
    """Score a text with a run: loss, perplexity, bits per byte; every token exactly once."""

    run: cli.MaybeRun = None
    """The run directory; the newest under runs/ when not given."""
    data: MaybeText = None
    """Text to score, as in `train --data`; what the run was trained on when not given."""
    data_config: MaybeText = None
    """Configuration of a hub dataset that has several."""
    data_limit: MaybeInt = None
    """Read at most this many bytes of text."""
    text_column: MaybeText = None
    """Column that holds the text."""
    streaming: bool = False
    """Read a hub dataset without storing a copy of its text."""
    split: MaybeText = None
    """Split to score; when not given, validation of the run's own corpus, else the first there is of test, validation, train."""
    stride: MaybeInt = None
    """Tokens that each window scores; as many as the model can when not given. A smaller one is slower and gives every token more context."""
    context_length: MaybeInt = None
    """Tokens of a window; the model's context when not given."""
    num_beams: MaybeInt = None
    """Translations followed at once by a beam search; when not given, the likeliest word is always taken."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the matrix products. In float32 a score is the same on every machine, and what the server says; auto is bfloat16 where the device is fast at it."""
    json: bool = False
    """Print one JSON object, for machines."""

    def __call__(self) -> None:
        """Score and print."""
        directory = find_run(self.run)
        model = load_model(directory, resolve_device(self.device))
        trained = dataclasses.replace(load_training_config(directory), precision=self.precision)
        about_data = ("data_config", "text_column", "data_limit", "streaming")
        if self.data is None:
            if any(getattr(self, name) for name in about_data):
                raise ValueError(
                    "options about the data need --data: without it, the run's own is scored"
                )
        else:
            others = {name: getattr(self, name) for name in about_data}
            trained = dataclasses.replace(trained, data=self.data, data_split=None, **others)
        task = open_task(trained, load_run_tokenizer(directory), to_train=self.data is None)
        names = ("test", "validation", "train") if self.data else ("validation",)
        wanted = self.split or next(name for name in names if name in task.splits)
        if wanted not in task.splits:
            raise ValueError(f"no split is named {wanted!r}; there are {', '.join(task.splits)}")
        asked = {
            "stride": self.stride,
            "context_length": self.context_length,
            "num_beams": self.num_beams,
        }
        options = {name: value for name, value in asked.items() if value is not None}
        for name in options.keys() - task.eval_options:
            raise ValueError(f"--{name} has no meaning in the task {trained.task}: leave it out")
        report = task.score(model, wanted, final=True, **options)
        if self.json:
            about = {"run": str(directory), "data": task.description, "split": wanted}
            print(json.dumps({**about, **report.to_json()}))
            return
        print(f"{directory} on the {wanted} split of {task.description}")
        print(report.table())


@dataclass(frozen=True)
class Plot:
    """Draw the loss curves of one or several runs."""

    run: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN …]")] = ()
    """Run directories; the newest under runs/ when none is given."""
    output: Path = Path("loss.svg")
    """Where to: .svg, .png or .pdf."""

    def __call__(self) -> None:
        """Draw and say where."""
        from training.plots import plot

        plot.plot_losses([find_run(run) for run in self.run or (None,)], self.output)
        print(self.output)


@dataclass(frozen=True)
class Translators:
    """Compare runs that translate: BLEU by the length of the sentence, as a table and a plot."""

    run: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN …")]
    """Run directories."""
    split: str = "test"
    """Split to translate."""
    num_beams: int = 1
    """Translations followed at once by a beam search; 1 always takes the likeliest word."""
    output: Path = Path("bleu.svg")
    """Where the plot goes: .svg, .png or .pdf; the table and a .json beside it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Translate, score, write."""
        from training.plots import plot

        if not self.run:
            raise ValueError("which runs? `translators RUN [RUN …]`")
        plot.check_output(self.output)
        rows = []
        for directory in map(find_run, self.run):
            run = load_training_config(directory)
            if TASKS[run.task].kind != "translation":
                raise ValueError(f"{directory}: was not trained to translate, but on {run.task}")
            task = open_task(run, load_run_tokenizer(directory))
            if self.split not in task.splits:
                raise ValueError(
                    f"{run.data} has no split named {self.split!r}; there are {', '.join(task.splits)}"
                )
            model = load_model(directory, resolve_device(self.device))
            score = task.score(model, self.split, beams=self.num_beams)
            last = plot.read_metrics(directory)
            row = {
                "run": directory.name,
                "model": run.model,
                "split": self.split,
                "parameters": count_parameters(model),
                "seconds": max(line.get("seconds", 0.0) for line in last),
                **score.to_json(),
            }
            rows.append(row)
            print(f"{directory}: BLEU {row['bleu']:.2f}", flush=True)
        write_atomically(self.output.with_suffix(".json"), json.dumps(rows, indent=2) + "\n")
        table = comparison(rows)
        write_atomically(self.output.with_suffix(".md"), table)
        plot.plot_bleu(rows, self.output)
        print(f"\n{table}\n{self.output}")


@dataclass(frozen=True)
class Ladder:
    """Train every rung that speaks on one corpus under one budget, and compare them: table and plot."""

    rungs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUNG …]")] = ()
    """Which rungs; all when none is given."""
    data: str = TrainingConfig.data
    """Corpus, as in `train`."""
    tokenizer: str = TrainingConfig.tokenizer
    """As in `train`."""
    vocab_size: int = TrainingConfig.vocab_size
    """Number of tokens that the tokenizer learns."""
    tokens: int = 240 * TrainingConfig.batch_size * TrainingConfig.context_length
    """Tokens that each rung is trained on."""
    seconds: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Seconds that each rung is trained for, instead of `--tokens`."""
    output: Path = RUNS / "ladder"
    """Folder of the rungs' runs, ladder.json, ladder.md and ladder.svg; one that was begun is gone on with."""
    seed: int = TrainingConfig.seed
    """Of every rung."""
    device: str = TrainingConfig.device
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Train, score, write."""
        from training.plots import plot

        if self.tokens < 1 or (self.seconds is not None and not 0 < self.seconds < math.inf):
            raise ValueError("--tokens must be at least 1, and --seconds above 0")
        names = ("data", "tokenizer", "vocab_size", "seed", "device")
        common = {name: getattr(self, name) for name in names}
        rows = ladder.run_ladder(
            self.output, self.rungs, common, self.tokens, self.seconds, train_on
        )
        write_atomically(self.output / "ladder.json", json.dumps(rows, indent=2) + "\n")
        write_atomically(self.output / "ladder.md", ladder.table(rows))
        plot.plot_ladder(rows, self.output / "ladder.svg")
        print(f"\n{ladder.table(rows)}\n{self.output / 'ladder.svg'}")


@dataclass(frozen=True)
class Figures:
    """Make the figures of docs/chapters.md: each a small experiment with the models."""

    name: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME …]")] = ()
    """Which figures; all when none is given."""
    output: Path = Path("docs/figures")
    """Folder that they are written to, as NAME.svg."""

    def __call__(self) -> None:
        """Compute, draw, say where."""
        from training.plots import plot

        for name, panels in figures.chosen(self.name).items():
            path = self.output / f"{name}.svg"
            plot.draw_figure(panels(), path)
            print(path, flush=True)


def show_plan(
    run: TrainingConfig, num_gpus: int, gpu: str | None, mfu: float, *, as_json: bool
) -> None:
    """Print what a run will take."""
    from training.plan import plan

    found = plan(run, num_gpus, gpu, mfu)
    print(json.dumps(found.to_json()) if as_json else found.table())


def start(run: TrainingConfig, directory: Path | None) -> None:
    """Say what will be done, and do it; where lost workers are restarted, go on with what they did."""
    if directory is None and distributed.is_restartable():
        raise ValueError(
            "--max-restarts needs --run DIR, by which the run is found again: torchrun … -m -- "
            "training train … --run DIR (without -- torchrun takes --run for an option of its own)"
        )
    world = distributed.init_process_group(run.device)
    directory = directory or RUNS / f"{run.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = world.broadcast(directory)
    if distributed.is_restartable() and world.broadcast(is_same_run(run, directory)):
        go_on(directory, run.device, world)
        return
    processes = f", {world.size} processes" if world.size > 1 else ""
    print(f"preset {run.preset}: {run.model} on {device_name(world.device(run.device))}{processes}")
    check(run)
    for name, value in dataclasses.asdict(run).items():
        if name not in {"preset", "model", *TASKS[run.task].unsupported_options}:
            print(f"  {name} = {value}")
    trainer = create_run(run, directory, world)
    print(f"data: {trainer.task.description}")
    for line in trainer.task.sizes:
        print(f"  {line}")
    print(f"run: {directory}, {count_parameters(trainer.model):,} parameters", flush=True)
    work(trainer)


def go_on(directory: Path, device: str, world: distributed.World) -> None:
    """Train on from the newest checkpoint of a run."""
    trainer = resume_run(directory, device, world)
    where = f"step {trainer.step} of {trainer.config.steps}"
    print(f"{trainer.directory}: continues at {where}", flush=True)
    work(trainer)


def work(trainer: Trainer) -> None:
    """Train to the end and report."""
    begun = time.monotonic()
    train_on(trainer, f"continue with: {PROG} train --resume {trainer.directory}")
    print(f"\ntrained in {format_duration(time.monotonic() - begun)}")
    if trainer.world.is_main_process:
        report(trainer)


def train_on(trainer: Trainer, advice: str = "continue with the same command") -> None:
    """Train to the end, or leave with the exit code of what stopped it."""
    try:
        trainer.train()
    except Stopped as stop:
        if trainer.world.is_main_process:
            print(f"\n{stop}; {advice}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except Diverged as divergence:
        if trainer.world.is_main_process:
            print(f"\n{PROG}: {divergence}", file=sys.stderr)
        sys.exit(1)


def report(trainer: Trainer) -> None:
    """Score the best weights on all that is held out, show a sample, say what comes next."""
    directory, task = trainer.directory, trainer.task
    score = trainer.score()
    print(f"the whole validation split, with the best weights:\n{score.table()}")
    print(
        f"a sample:\n\n{task.sample(trainer.eval_model, min(200, trainer.config.context_length - 1))}"
    )
    print(f"\nthe run is in {directory}; next:\n  make eval RUN={directory}")
    if task.kind == "text":
        print(f'  make sample RUN={directory} PROMPT="..."\n  make serve RUN={directory}')
    if task.kind == "translation":
        print(f'  tinygpt xray {directory} "a sentence to translate"')


def main(prog: str = PROG, arguments: Sequence[str] | None = None) -> None:
    """Choose the command; `train` and `plan` take their options from the preset named after them."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = DEFAULT_PRESET.get(resolve_device("auto").type, "gpt-nano")
    if arguments[:1] == ["train"] and "--resume" in arguments:
        arguments.remove("--resume")
        train: Callable[..., cli.Command] = Resume
    else:
        if arguments[:1] in (["train"], ["plan"]) and arguments[1:] and arguments[1][:1] != "-":
            name = arguments.pop(1)
        try:
            train = train_command(name)
        except ValueError as error:
            cli.exit_with_error(prog, str(error))
    commands: dict[str, Callable[..., cli.Command]] = {
        "train": train,
        "plan": plan_command(name),
        "eval": Eval,
        "ladder": Ladder,
        "translators": Translators,
        "figures": Figures,
        "plot": Plot,
        "presets": Presets,
        "describe": Describe,
        "xray": Xray,
    }
    cli.main(prog, "Train the models, score and compare them.", commands, arguments)

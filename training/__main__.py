"""`python -m training`: train a model on a text, continue a run, score it."""

import dataclasses
import inspect
import json
import math
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from gpt import LanguageModel, cli
from gpt.checkpoint import RUNS, find_run, load_tensors, load_weights, open_model, save_config
from gpt.cli import MaybeInt, MaybePath, MaybeText
from gpt.describe import parameters
from gpt.device import describe, find_device
from gpt.sampling import Sampling, generate
from tokenizer import Tokenizer
from training.corpus import Corpus, open_corpus
from training.evaluate import Score, compressors, evaluate_split
from training.loop import (
    Diverged,
    Stopped,
    Trainer,
    new_model,
    newest_checkpoint,
    read_run,
    save_run,
)
from training.presets import PRESETS, Run, model_options, preset
from training.progress import duration

PROG = "python -m training"
DEFAULT_PRESET = {"cuda": "gpt-micro"}
"""By device; gpt-nano on all others."""

COMPRESSED = 2**24
"""Bytes of text up to which general compressors are run beside the model."""


def train_command(name: str) -> Callable[..., cli.Command]:
    """The `train` command with the options of preset `name`, its values as their defaults."""
    chosen = preset(name)
    options: Any = model_options(chosen)
    own = options()

    def train(
        settings: Run = chosen,
        model: options = own,
        run: MaybePath = None,
    ) -> cli.Command:
        """Train a model on a text: `train [PRESET] [options]`, or `train --resume [RUN]` to go on.

        PRESETS

        Args:
            settings: What to train on, and how.
            model: The model's own arguments.
            run: Where to write the run; runs/<preset>-<time> when not given.
        """
        resolved = dataclasses.replace(settings, arguments=dataclasses.asdict(model))
        return lambda: start(resolved, run)

    names = textwrap.fill(f"Presets: {', '.join(PRESETS)}.", 78)
    train.__doc__ = inspect.cleandoc(train.__doc__ or "").replace("PRESETS", names)
    return train


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest checkpoint, exactly as if it had not been stopped."""

    run: cli.MaybeRun = None
    """The run directory; the newest under runs/ when not given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Train on."""
        directory = find_run(self.run, "run.json")
        run = dataclasses.replace(read_run(directory), device=self.device)
        device = find_device(run.device)
        tokenizer = Tokenizer.open(directory / "tokenizer.json")
        corpus = prepare(run, tokenizer)
        trainer = Trainer(run, directory, corpus, tokenizer, device)
        checkpoint = newest_checkpoint(directory)
        if checkpoint:
            trainer.resume(checkpoint)
        print(f"{directory}: continues at step {trainer.step} of {run.steps}", flush=True)
        work(trainer)


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
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto is bfloat16 where the device is fast at it."""
    json: bool = False
    """Print one JSON object, for machines."""

    def __call__(self) -> None:
        """Score and print."""
        directory = find_run(self.run)
        model = open_model(directory, find_device(self.device))
        tokenizer = Tokenizer.open(directory / "tokenizer.json")
        trained = read_run(directory)
        if self.data is None:
            if self.data_config or self.text_column or self.data_limit or self.streaming:
                raise ValueError(
                    "options about the data need --data: without it, the run's own is scored"
                )
            corpus = prepare(trained, tokenizer)
            wanted = self.split or "validation"
        else:
            other = dataclasses.replace(
                trained,
                data=self.data,
                data_config=self.data_config,
                data_limit=self.data_limit,
                data_split=None,
                text_column=self.text_column,
                streaming=self.streaming,
            )
            corpus = prepare(other, tokenizer, hold_out=False)
            names = ("test", "validation", "train")
            wanted = self.split or next(name for name in names if name in corpus.splits)
        if wanted not in corpus.splits:
            raise ValueError(f"no split is named {wanted!r}; there are {', '.join(corpus.splits)}")
        split = corpus.splits[wanted]
        score = evaluate_split(model, split, self.stride, self.precision)
        beside = {}
        if split.bytes <= COMPRESSED:
            beside = compressors(text_of(split.tokens, tokenizer))
        if self.json:
            about = {"run": str(directory), "data": self.data or trained.data, "split": wanted}
            print(json.dumps({**about, **score.to_json(), "compressors": beside}))
            return
        print(f"{directory} on the {wanted} split of {corpus.description}")
        print(table(score, beside))


@dataclass(frozen=True)
class Plot:
    """Draw the loss curves of one or several runs."""

    run: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN …]")] = ()
    """Run directories; the newest under runs/ when none is given."""
    output: Path = Path("loss.svg")
    """Where to: .svg, .png or .pdf."""

    def __call__(self) -> None:
        """Draw and say where."""
        try:
            from training.plot import plot_losses
        except ImportError:
            raise ValueError("plots need one more package: pip install matplotlib") from None
        plot_losses([find_run(run) for run in self.run or (None,)], self.output)
        print(self.output)


def start(run: Run, directory: Path | None) -> None:
    """Prepare the corpus, open a run directory, train, report."""
    device = find_device(run.device)
    with torch.device("meta"):  # what does not fit together is said before the data is read
        new_model(run, run.vocabulary)
    directory = directory or RUNS / f"{run.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (directory / "run.json").exists():
        raise ValueError(
            f"{directory} already holds a run: continue it with --resume {directory}, "
            "or choose another --run"
        )
    print(f"preset {run.preset}: {run.model} on {describe(device)}")
    for name, value in dataclasses.asdict(run).items():
        if name not in ("preset", "model"):
            print(f"  {name} = {value}")
    corpus = prepare(run)
    tokenizer = corpus.tokenizer
    print(f"corpus: {corpus.description}")
    for split in corpus.splits.values():
        print(
            f"  {split.name}: {split.bytes:,} bytes, {len(split.tokens):,} tokens, "
            f"{split.documents:,} documents"
        )
    trainer = Trainer(run, directory, corpus, tokenizer, device)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / "tokenizer.json")
    given = {"vocabulary": tokenizer.vocabulary, "context": run.window, **run.arguments}
    save_config(directory, run.model, given)
    known = facts(corpus, trainer.model, device)
    save_run(run, directory, known)
    print(f"run: {directory}, {known['parameters']:,} parameters", flush=True)
    work(trainer)


def work(trainer: Trainer) -> None:
    """Train to the end and report; or leave with the exit code of what stopped it."""
    begun = time.monotonic()
    try:
        trainer.train()
    except Stopped as stop:
        print(
            f"\n{stop}; continue with: {PROG} train --resume {trainer.directory}", file=sys.stderr
        )
        sys.exit(stop.exit_code)
    except Diverged as divergence:
        print(f"\n{PROG}: {divergence}", file=sys.stderr)
        sys.exit(1)
    print(f"\ntrained in {duration(time.monotonic() - begun)}")
    report(trainer)


def report(trainer: Trainer) -> None:
    """Score the best weights on the whole validation split, show a sample, say what comes next."""
    directory, model, tokenizer = trainer.directory, trainer.model, trainer.tokenizer
    path = directory / "model.safetensors"
    load_weights(model, load_tensors(path, trainer.device), path)
    model.eval()
    split = trainer.corpus.splits["validation"]
    score = evaluate_split(model, split, precision=trainer.run.precision)
    final = {f"final_{name}": value for name, value in score.to_json().items()}
    trainer.metrics.write(trainer.step, **final)
    print(f"the whole validation split, with the best weights:\n{table(score, {})}")
    print("a sample at temperature 0.8:\n")
    stream, end = tokenizer.stream(), tokenizer.end_of_text
    length = min(200, trainer.run.window - 1)
    for token in generate(model, [end], length, Sampling(temperature=0.8, seed=0), {end}):
        if token != end:
            print(stream.push(token), end="", flush=True)
    print(stream.flush())
    print(
        f"\nthe run is in {directory}; next:\n"
        f'  make sample RUN={directory} PROMPT="..."\n'
        f"  make eval RUN={directory}\n"
        f"  make serve RUN={directory}"
    )


def prepare(run: Run, tokenizer: Tokenizer | None = None, hold_out: bool = True) -> Corpus:
    """The run's corpus as tokens; already prepared ones are opened without `datasets`."""
    if (Path(run.data) / "corpus.json").is_file():
        return open_corpus(Path(run.data))
    from training import data

    source = data.Source(
        run.data,
        config=run.data_config,
        split=run.data_split,
        column=run.text_column,
        streaming=run.streaming,
        limit=run.data_limit,
    )
    return data.prepare(source, tokenizer or run.tokenizer, run.vocabulary, hold_out)


def facts(corpus: Corpus, model: LanguageModel, device: torch.device) -> dict[str, Any]:
    """What run.json says beside the configuration."""
    packages = ("tinygpt", "torch", "tokenizers", "datasets")
    return {
        "corpus": {"fingerprint": corpus.fingerprint, "description": corpus.description},
        "parameters": parameters(model),
        "device": describe(device),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code that runs, where it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def text_of(tokens: Any, tokenizer: Tokenizer) -> bytes:  # noqa: ANN401 (a numpy array)
    """The documents of a split, joined."""
    return tokenizer.decode(tokens.tolist()).encode()


def table(score: Score, beside: dict[str, float]) -> str:
    """The score in lines, its units and its setting with it."""
    lines = [
        f"  loss             {score.loss:.4f} nats per token",
        f"  perplexity       {score.perplexity:.3f} per token",
        f"  word perplexity  {score.word_perplexity:.2f}",
        f"  bits per byte    {score.bits_per_byte:.4f}",
        *(f"    {name:<15}{bits:.4f}" for name, bits in beside.items()),
        f"  context {score.context}, stride {score.stride}; "
        f"{score.tokens:,} tokens, {score.words:,} words, {score.bytes:,} bytes",
    ]
    if math.isnan(score.word_perplexity):
        del lines[2]
    return "\n".join(lines)


def main() -> None:
    """Choose the command; `train` takes its options from the preset named after it."""
    arguments = sys.argv[1:]
    commands: dict[str, Callable[..., cli.Command]] = {"eval": Eval, "plot": Plot}
    name = DEFAULT_PRESET.get(find_device("auto").type, "gpt-nano")
    if arguments[:1] == ["train"] and "--resume" in arguments:
        arguments.remove("--resume")
        commands["train"] = Resume
    else:
        if arguments[:1] == ["train"] and len(arguments) > 1 and arguments[1][:1] != "-":
            name = arguments.pop(1)
        try:
            commands["train"] = train_command(name)
        except ValueError as error:
            cli.refuse(PROG, str(error))
    cli.main(PROG, "Train a language model on a text, and score it.", commands, arguments)


if __name__ == "__main__":
    main()

"""`tinygpt train`, `plan`, `presets` and `describe`; the parser of all training commands."""

import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from gpt import CHAPTERS, Model, cli, summary
from gpt.checkpoint import (
    MODEL_CLASSES,
    build_model,
    did_you_mean,
    find_run,
    read_config,
    run_path,
)
from gpt.cli import MaybeText
from gpt.device import is_gpu, resolve_device
from training import distributed, launch
from training.chapters.commands import Chapter, Figures
from training.config import TrainingConfig, model_options, new_model, resolve_config
from training.evaluation.commands import Eval, Ladder, Translators
from training.evaluation.nearest import Nearest
from training.finetuning import finetune_config
from training.interchange import Export, Import
from training.plots.commands import Plot, Xray
from training.presets import ABOUT, PRESETS, chapter_of, get_preset
from training.tasks import TASKS


def train_command(preset: TrainingConfig) -> Callable[..., cli.Command]:
    """Return the `train` command whose option defaults are those of a preset."""
    options: Any = model_options(preset)

    def train(
        config: TrainingConfig = preset,
        model: options = options(),  # noqa: B008 (frozen)
        run: MaybeText = None,
    ) -> cli.Command:
        """Train a model: `train [PRESET] [options]`, or resume a run: `train --resume [RUN]`.

        `tinygpt presets` lists the presets.

        Args:
            config: Data, optimizer and schedule.
            model: Constructor arguments of the model.
            run: Run to create: a name in runs/, or a path. Default: runs/<preset>-<time>.
        """

        def start() -> None:
            directory = None if run is None else run_path(run)
            launch.start_run(resolve_config(config, model, preset), directory)

        return start

    return train


def plan_command(preset: TrainingConfig) -> Callable[..., cli.Command]:
    """Return the `plan` command, which takes the options of `train` and describes the hardware."""
    options: Any = model_options(preset)

    def plan(
        config: TrainingConfig = preset,
        model: options = options(),  # noqa: B008 (frozen)
        num_gpus: int = 1,
        gpu: MaybeText = None,
        mfu: float = 0.4,
        json: bool = False,
    ) -> cli.Command:
        """Estimate the memory, FLOPs and time of a run: `plan [PRESET] [options as in train] --num-gpus N`.

        Args:
            config: Data, optimizer and schedule.
            model: Constructor arguments of the model.
            num_gpus: Number of GPUs, with one process on each.
            gpu: Name of the GPU: H100, A100 80GB, …. Default: this machine's device.
            mfu: Expected model FLOPs utilization: the share of the GPU's peak that is reached.
            json: Print one JSON object.
        """

        def print_plan() -> None:
            from training.plan import make_plan

            result = make_plan(resolve_config(config, model, preset), num_gpus, gpu, mfu)
            print(jsonlib.dumps(result.to_json()) if json else result.table())

        return print_plan

    return plan


@dataclass(frozen=True)
class Presets:
    """List the presets of `train`: chapter, steps, duration on two cores, and what each learns."""

    def __call__(self) -> None:
        """Print the table, chapter by chapter."""
        print(f"{'preset':<23}{'chapter':>7}{'steps':>9}  {'time':<10}learns")
        for name, config in sorted(PRESETS.items(), key=lambda item: chapter_of(item[1])):
            about = ABOUT[name]
            numbers = f"{chapter_of(config):>7}{config.steps:>9,}"
            print(f"{name:<23}{numbers}  {about.time:<10}{about.learns}")


@dataclass(frozen=True)
class Describe:
    """Count a model's parameters by kind, from its shapes alone."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|PRESET|RUN|gpt3")]
    """Model name (at nano size), preset of `tinygpt train`, run directory, or gpt3."""

    def __call__(self) -> None:
        """Print the table."""
        print(summary.describe(self.build_model()))

    def build_model(self) -> Model:
        """Build the model on the meta device; a ValueError lists the valid names."""
        if self.model == "gpt3":
            return summary.build_gpt3()
        if self.model in MODEL_CLASSES:
            return summary.build_on_meta(MODEL_CLASSES[self.model])
        if preset := PRESETS.get(self.model):
            model_args = TASKS[preset.task].expected_model_args(preset)  # may compute a table
            with torch.device("meta"):
                return new_model(preset, model_args)
        run = self.model and run_path(self.model)
        if run and any(Path(path, "config.json").is_file() for path in (run, self.model)):
            config = read_config(find_run(self.model))
            with torch.device("meta"):
                return build_model(*config)
        presets = [name for name in PRESETS if name not in MODEL_CLASSES]
        raise ValueError(
            f"{self.model!r} is neither a model nor a preset"
            f"{did_you_mean(self.model, [*MODEL_CLASSES, *PRESETS])} nor a run directory; "
            f"the models are {', '.join(CHAPTERS)}, gpt3; further presets {', '.join(presets)}"
        )


@dataclass(frozen=True)
class Resume:
    """Resume a run from its newest checkpoint, with the result of an uninterrupted run."""

    run: cli.MaybeRun = None
    """Run: a name in runs/, or a path. Default: the newest under runs/."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Resume."""
        world = distributed.init_process_group(self.device)
        launch.resume(world.broadcast(find_run(self.run, "run.json")), self.device, world)


def _take_preset(arguments: list[str]) -> TrainingConfig | None:
    """Return what the first arguments of `train` name, a preset or `--from RUN`; remove a preset's name."""
    names = [each.partition("=") for each in arguments]
    parents = [
        value if equals else arguments[index + 1 : index + 2]
        for index, (option, equals, value) in enumerate(names)
        if option == "--from"
    ]
    named = arguments[1:2] if arguments[1:2] and arguments[1][:1] != "-" else []
    if not parents:
        return get_preset(arguments.pop(1)) if named else None
    if named:
        raise ValueError(f"leave out the preset {named[0]}: --from has the model of its run")
    run = parents[-1] if isinstance(parents[-1], str) else "".join(parents[-1])
    return finetune_config(find_run(run))


def main(prog: str = "python -m training", arguments: Sequence[str] | None = None) -> None:
    """Parse and run a command; `train` and `plan` take their defaults from a preset named first."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    preset = get_preset("gpt-micro" if is_gpu(resolve_device("auto")) else "gpt-nano")
    if arguments[:1] == ["train"] and "--resume" in arguments:
        arguments.remove("--resume")
        train: Callable[..., cli.Command] = Resume
    else:
        try:
            if arguments[:1] in (["train"], ["plan"]):
                preset = _take_preset(arguments) or preset
            train = train_command(preset)
        except ValueError as error:
            cli.exit_with_error(prog, str(error))
    commands: dict[str, Callable[..., cli.Command]] = {
        "train": train,
        "plan": plan_command(preset),
        "eval": Eval,
        "ladder": Ladder,
        "translators": Translators,
        "chapter": Chapter,
        "figures": Figures,
        "plot": Plot,
        "presets": Presets,
        "describe": Describe,
        "xray": Xray,
        "nearest": Nearest,
        "export": Export,
        "import": Import,
    }
    cli.main(prog, "Train, evaluate and compare models.", commands, arguments)

"""`tinygpt train`, `plan`, `presets` and `describe`; the parser of all training commands."""

import dataclasses
import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro

from gpt import CHAPTERS, Model, cli, settings, summary
from gpt.checkpoint import (
    MODEL_CLASSES,
    build_model,
    check_format,
    did_you_mean,
    find_run,
    read_config,
    read_json,
    run_argument,
    run_path,
)
from gpt.cli import OptionalText
from gpt.device import is_gpu, resolve_device
from training import distributed, launch
from training.chapters.commands import Chapter, Figures
from training.config import (
    PRESET_ARGS,
    TASK_ARGS,
    TrainingConfig,
    model_options,
    new_model,
    resolve_config,
)
from training.data.commands import Prepare
from training.data.mixture import join_data_options
from training.evaluation.commands import (
    Compare,
    Eval,
    Ladder,
    LmEval,
    Translators,
    run_lm_eval,
)
from training.evaluation.nearest import Nearest
from training.evaluation.sample_quality import SampleQuality
from training.finetuning import finetune_config
from training.interchange import Export, Import
from training.plots.commands import Plot, Xray
from training.presets import ABOUT, PRESETS, chapter_of, get_preset
from training.tasks import TASKS

ConfigFile = Annotated[
    Path | None, tyro.conf.arg(name="config", metavar="FILE", help_behavior_hint="")
]


@dataclass(frozen=True)
class _Target:
    run: str | None = None


class Defaults(NamedTuple):
    """What the options of `train` and `plan` are before those that are typed."""

    preset: TrainingConfig
    """A preset; learning rates that still are the preset's scale with batch and width."""
    config: TrainingConfig
    """The preset with the settings of a configuration file."""
    model: Any
    """The model's options, also with these settings."""
    run: str | None = None


def preset_defaults(preset: TrainingConfig) -> Defaults:
    """Return the defaults that are those of a preset."""
    return Defaults(preset, preset, model_options(preset)())


def train_command(defaults: Defaults) -> Callable[..., cli.Command]:
    """Return the `train` command with these defaults."""
    options: Any = type(defaults.model)

    def train(
        config: TrainingConfig = defaults.config,
        model: options = defaults.model,
        run: OptionalText = defaults.run,
        config_file: ConfigFile = None,  # noqa: ARG001 (read by `main`)
    ) -> cli.Command:
        """Train a model: `train [PRESET] [options]`, or resume a run: `train --resume [RUN]`.

        `tinygpt presets` lists the presets.

        Args:
            config: Data, optimizer and schedule.
            model: Constructor arguments of the model.
            run: Run to create: a name in runs/, or a path. Default: runs/<preset>-<time>.
            config_file: TOML file of options, such as steps = 1000, or the run.json of a run to repeat. Options that are typed win over it.
        """

        def start() -> None:
            directory = None if run is None else run_path(run)
            launch.start_run(resolve_config(config, model, defaults.preset), directory)

        return start

    return train


def plan_command(defaults: Defaults) -> Callable[..., cli.Command]:
    """Return the `plan` command, which takes the options of `train` and describes the hardware."""
    options: Any = type(defaults.model)

    def plan(
        config: TrainingConfig = defaults.config,
        model: options = defaults.model,
        num_gpus: int = 1,
        gpu: OptionalText = None,
        mfu: float = 0.4,
        json: bool = False,
        config_file: ConfigFile = None,  # noqa: ARG001 (read by `main`)
    ) -> cli.Command:
        """Estimate the memory, FLOPs and time of a run: `plan [PRESET] [options as in train] --num-gpus N`.

        Args:
            config: Data, optimizer and schedule.
            model: Constructor arguments of the model.
            num_gpus: Number of GPUs, with one process on each.
            gpu: Name of the GPU: H100, A100 80GB, …. Default: this machine's device.
            mfu: Expected model FLOPs utilization: the share of the GPU's peak that is reached.
            json: Print one JSON object.
            config_file: The file that `train` takes: TOML, or the run.json of a run.
        """

        def print_plan() -> None:
            from training.plan import make_plan

            result = make_plan(resolve_config(config, model, defaults.preset), num_gpus, gpu, mfu)
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

    run: cli.OptionalRun = None
    """Run: a name in runs/, or a path. Default: the newest under runs/."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Resume."""
        world = distributed.init_process_group(self.device)
        launch.resume(world.broadcast(find_run(self.run, "run.json")), self.device, world)


def _take_preset(arguments: list[str], found: settings.Settings) -> TrainingConfig | None:
    """Return what arguments or settings name, a preset or `--from RUN`; remove a preset's name."""
    named = arguments.pop(1) if arguments[1:2] and arguments[1][:1] != "-" else None
    preset = found.pop("preset", None)
    if preset and named is None:
        named = settings.check(preset, str)
    run = settings.find_option(arguments, "--from")
    if run is None and "from" in found:
        run = settings.check(found["from"], str)
    if run is None:
        return None if named is None else get_preset(named)
    if named is not None:
        raise ValueError(f"leave out the preset {named}: --from has the model of its run")
    return finetune_config(find_run(run))


def _configure(arguments: list[str], preset: TrainingConfig) -> tuple[Defaults, str]:
    """Return the defaults of `train`: a preset, --from, and the --config file; and a note on their origin."""
    path = settings.find_option(arguments, "--config")
    if path is not None and Path(path).suffix == ".json":
        return _repeated(Path(path), arguments), f" (options also come from {path})"
    found = {} if path is None else settings.read_settings(Path(path), ("model",))
    note = settings.describe_sources(found)
    preset = _take_preset(arguments, found) or preset
    default = preset_defaults(preset)
    config, model, target = settings.apply(found, arguments, preset, default.model, _Target())
    return Defaults(preset, config, model, target.run), note


def _repeated(path: Path, arguments: list[str]) -> Defaults:
    """Return the options of a run from its run.json; they are the preset of a new run."""
    if arguments[1:2] and arguments[1][:1] != "-":
        raise ValueError(f"leave out the preset {arguments[1]}: {path} has the options of its run")
    if settings.find_option(arguments, "--from") is not None:
        raise ValueError(f"leave out --from: {path} has the options of its run")
    content = read_json(path)
    check_format(path, content)
    values = content.get("config")
    model_args = values.get("model_args") if isinstance(values, dict) else None
    if not (isinstance(values, dict) and isinstance(model_args, dict)):
        raise ValueError(f"{path}: it has no options of a run: expected the run.json of a run")
    if values.get("data") == "":
        run = run_argument(path.parent)
        raise ValueError(
            f"{path}: the run was imported, not trained; continue it with --from {run}"
        )
    names = {name: values.get(name) for name in ("preset", "model")}
    texts = {
        name: settings.check(settings.Setting(f"{path}: {name}", value), str)
        for name, value in names.items()
    }
    kept = {k: v for k, v in model_args.items() if k in (*PRESET_ARGS, *TASK_ARGS)}
    preset = TrainingConfig(**texts, model_args=kept)
    entries = {k: v for k, v in values.items() if k not in (*texts, "model_args")}
    entries |= {k: v for k, v in model_args.items() if k not in kept}
    found = {
        "from" if name == "init_from" else name.replace("_", "-"): settings.Setting(
            f"{path}: {name}", value
        )
        for name, value in entries.items()
    }
    config, model = settings.apply(found, arguments, preset, model_options(preset)())
    return preset_defaults(dataclasses.replace(config, model_args=kept | dataclasses.asdict(model)))


def main(prog: str = "python -m training", arguments: Sequence[str] | None = None) -> None:
    """Parse and run a command; `train` and `plan` take their defaults from a preset or a file."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    preset = get_preset("gpt-micro" if is_gpu(resolve_device("auto")) else "gpt-nano")
    defaults, note = preset_defaults(preset), ""
    train: Callable[..., cli.Command] = Resume
    with cli.reported_errors(prog):
        if arguments[:1] == ["lm-eval"] and arguments[1:] not in ([], ["-h"], ["--help"]):
            run_lm_eval(arguments[1:])
            return
        arguments = join_data_options(arguments)
        if arguments[:1] == ["train"] and "--resume" in arguments:
            arguments.remove("--resume")
            if settings.find_option(arguments, "--config") is not None:
                raise ValueError(
                    "leave out --config: --resume continues with the run's own options"
                )
        else:
            if arguments[:1] in (["train"], ["plan"]):
                defaults, note = _configure(arguments, preset)
            train = train_command(defaults)
    commands: dict[str, Callable[..., cli.Command]] = {
        "train": train,
        "plan": plan_command(defaults),
        "prepare": Prepare,
        "eval": Eval,
        "lm-eval": LmEval,
        "ladder": Ladder,
        "compare": Compare,
        "sample-quality": SampleQuality,
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
    cli.main(prog, "Train, evaluate and compare models.", commands, arguments, None, note)

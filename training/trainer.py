"""The loop: batch, loss, gradient, step; now and then a validation, a sample, a checkpoint.

A checkpoint holds all that the next step depends on: weights, optimizer, random state and
what the log has not said yet. The order of the data is a pure function of seed and step.
So a run that was stopped, however, continues as if nothing had been.
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt import LanguageModel, Model, State
from gpt.checkpoint import (
    FORMAT,
    build_model,
    find_run,
    load_tensors,
    load_weights,
    model_class,
    read_json,
    save_tensors,
    unique_state_dict,
    write_atomically,
)
from gpt.device import autocast, peak_flops, retain_freed_memory
from tokenizer import Tokenizer
from training.config import TrainingConfig
from training.distributed import (
    SINGLE_PROCESS,
    World,
    apply_fsdp,
    full_tensor,
    no_sync,
    sharded_like,
    wrap_ddp,
)
from training.optimizer import Optimizers, lr_schedule
from training.progress import Progress
from training.tasks.base import Prefetcher, Report, Task

CHECKPOINTS_KEPT = 2


class Stopped(Exception):
    """A signal asked the run to end; its state is saved."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, saved {checkpoint}")
        self.exit_code = 128 + signal_number


class Diverged(Exception):
    """The loss is not a finite number any more."""


class Objective(nn.Module):
    """A model whose forward pass is its loss: what is compiled or wrapped is this, what is saved is the model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor, state: State | None = None) -> Tensor:
        """The scalar to minimise; with a state, of text that goes on from it."""
        if state is None:
            return self.model.loss(*batch)
        assert isinstance(self.model, LanguageModel)
        return self.model.stateful_loss(state, *batch)


class SignalHandler:
    """Remembers SIGINT or SIGTERM until the loop has a moment; a second SIGINT interrupts at once."""

    received: int | None = None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this context the two signals are noted instead of fatal."""
        both = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._note) for number in both]
        try:
            yield
        finally:
            for number, handler in zip(both, before, strict=True):
                signal.signal(number, handler)


class MetricsLogger:
    """metrics.jsonl, one object a line; TensorBoard too where asked for."""

    def __init__(self, directory: Path, tensorboard: bool, resume_at: int) -> None:
        self.path = directory / "metrics.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        # What was logged after the checkpoint will be logged again; so will the final score.
        kept = [line for line in lines if _is_before(line, resume_at)]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self.writer: Any = None
        if tensorboard:
            self.writer = _summary_writer(directory, resume_at)

    def write(self, step: int, **values: Any) -> None:  # noqa: ANN401 (what JSON can hold)
        """Append what is known at a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        if self.writer:
            for name, value in values.items():
                if isinstance(value, str):
                    self.writer.add_text(name, value, step)
                elif isinstance(value, int | float):
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self.writer:
            self.writer.close()


def _is_before(line: str, step: int) -> bool:
    """Whether a line of the log is whole, of an earlier step or this one, and not the final score."""
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return bool(values["step"] <= step and "final_loss" not in values)


def _summary_writer(directory: Path, resume_at: int) -> Any:  # noqa: ANN401 (an optional library's type)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=resume_at + 1)


class Trainer:
    """One run: a model, its task and a directory.

    In a world of several processes each has a trainer. They take the same steps, each computing
    with its rows of the batch; rank 0's writes and speaks for all.
    """

    def __init__(
        self,
        config: TrainingConfig,
        directory: Path,
        task: Task,
        device: torch.device,
        progress: Progress | None = None,
        world: World = SINGLE_PROCESS,
    ) -> None:
        retain_freed_memory()
        self.config, self.directory, self.task = config, directory, task
        self.device, self.world = device, world
        peak = peak_flops(device) if task.sequence_length else None
        self.progress = progress or Progress(config.steps, peak, task.unit)
        torch.manual_seed(config.seed)
        self.model: Model = new_model(config, task.model_args)
        self.objective = Objective(self.model)
        self.eval_model = self.model
        """What rank 0 validates and samples: where the model is sharded, a whole copy."""
        self.sharded = config.fsdp and world.size > 1
        if self.sharded:
            self.eval_model = copy.deepcopy(self.model) if world.is_main_process else self.model
            apply_fsdp(self.objective, device, config.precision)
        else:
            self.model.to(device)
        # On a CPU the batch would only be made at the cost of the step beside it.
        self.prefetcher = Prefetcher(task, config.steps, enabled=device.type != "cpu")
        self.optimizers = Optimizers(self.model, config, device)
        self.flops = self.model.flops_per_token(task.sequence_length or 1)
        self.signals = SignalHandler()
        self.step = 0
        self.tokens_seen = 0
        """Targets that it has been trained on."""
        self.seconds = 0.0
        """Spent on that, up to the last line of the log."""
        self.best = math.inf
        self.state: State | None = None
        """What is carried from one batch to the next, if anything is."""
        self.pending: list[float] = []
        """Losses of the steps since the last line of the log."""
        if not world.is_main_process:
            self._seed()

    def _seed(self) -> None:
        """Random numbers that no other rank has, nor this one at another step."""
        words = np.random.SeedSequence([self.config.seed, self.world.rank, self.step])
        torch.manual_seed(int(words.generate_state(1)[0]))

    def load_init_embedding(self) -> None:
        """Take over the embedding of another run where that was asked for.

        A ValueError says why it does not fit.
        """
        if self.config.init_embedding is None:
            return
        other = Path(self.config.init_embedding)
        path = find_run(other) / "model.safetensors"
        found = load_tensors(path, self.device).get("embedding.weight")
        own = self.model.get_parameter("embedding.weight")
        assert self.task.tokenizer
        if Tokenizer.load(other).fingerprint != self.task.tokenizer.fingerprint:
            raise ValueError(
                f"--init-embedding {other} has another tokenizer: give it to this run too, "
                f"with --tokenizer {other}"
            )
        if found is None or found.shape != own.shape:
            shape = "none" if found is None else f"{list(found.shape)}"
            raise ValueError(
                f"--init-embedding {other}: its embedding has the shape {shape}, this model's "
                f"{list(own.shape)}: choose the same width"
            )
        with torch.no_grad():
            own.copy_(sharded_like(found, own))

    def train(self) -> None:
        """Train from where the state stands to the last step.

        Raises Stopped after a signal and Diverged after a loss that is not finite.
        """
        objective: Callable[..., Tensor] = self.objective
        if self.config.compile:
            objective = torch.compile(objective)
        if self.world.size > 1 and not self.sharded:
            objective = wrap_ddp(objective)
        if self.world.is_main_process:
            self.metrics = MetricsLogger(self.directory, self.config.tensorboard, self.step)
        losses: list[Tensor] = []
        self.model.train()
        first, first_seen, before = self.step, self.tokens_seen, self.seconds
        begun = time.monotonic()
        try:
            with self.signals.watched():
                while self.step < self.config.steps:
                    losses.append(self.train_step(objective))
                    self.step += 1
                    last = self.step == self.config.steps
                    due = {
                        "log": last or self.step % self.config.log_interval == 0,
                        "validation": last or self.step % self.config.eval_interval == 0,
                        "checkpoint": last or self.step % self.config.checkpoint_interval == 0,
                    }
                    signalled = self.world.all_reduce_max(self.signals.received or 0)
                    if any(due.values()) or signalled:
                        self.pending += self.world.all_reduce_mean(torch.stack(losses)).tolist()
                        losses.clear()
                        self._check_finite()
                    if due["log"]:
                        elapsed = time.monotonic() - begun
                        self.seconds = before + elapsed
                        left = elapsed / (self.step - first) * (self.config.steps - self.step)
                        self._log((self.tokens_seen - first_seen) / elapsed, left)
                    if due["validation"]:
                        self._validate()
                    if due["checkpoint"] or signalled:
                        path = self.save()
                        if signalled and not last:
                            raise Stopped(signalled, path)
        finally:
            self.prefetcher.close()
            if self.world.is_main_process:
                self.metrics.close()

    def train_step(self, objective: Callable[..., Tensor]) -> Tensor:
        """One optimizer step; returns its mean loss, still on the device: the ranks' mean is the batch's.

        The device is only told what to do, and never waited for.
        """
        arrays = self.prefetcher.batch(self.step)
        targets = int((arrays[-1] != -100).sum())
        self.tokens_seen += targets
        mine = self.world.local_rows(len(arrays[0]))
        arrays = tuple(array[mine] for array in arrays)
        if not self.task.continues_previous(self.step):
            self.state = self._first_state(len(arrays[0]))
        counted = np.array_split(arrays[-1] != -100, self.config.gradient_accumulation_steps)
        batch = (_to_device(array, self.device) for array in arrays)
        parts = zip(
            *(tensor.tensor_split(self.config.gradient_accumulation_steps) for tensor in batch),
            strict=True,
        )
        total = torch.zeros((), device=self.device)
        for left, part in zip(
            reversed(range(self.config.gradient_accumulation_steps)), parts, strict=True
        ):
            # Each part counts for the targets in it, so that the mean is that of the whole batch.
            share = counted[-1 - left].sum() / targets * self.world.size
            with no_sync(objective, left):
                with autocast(self.device, self.config.precision):
                    loss = objective(*part, state=self.state) * share
                loss.backward()
            total += loss.detach()
        self.optimizers.step(self.step)
        return total

    def _first_state(self, rows: int) -> State | None:
        """An empty state where one is to be carried."""
        if not self.config.stateful:
            return None
        assert isinstance(self.model, LanguageModel)
        state = self.model.init_state(rows, self.config.context_length)
        return {name: full_tensor(tensor) for name, tensor in state.items()}

    def _check_finite(self) -> None:
        if all(map(math.isfinite, self.pending)):
            return
        bad = self.step - len(self.pending) + 1
        bad += next(i for i, loss in enumerate(self.pending) if not math.isfinite(loss))
        saved = newest_checkpoint(self.directory)
        raise Diverged(
            f"the loss of step {bad} is not finite; the last good checkpoint is "
            f"{saved or 'none yet'}: try a lower --learning-rate"
        )

    def _log(self, speed: float, left: float) -> None:
        """A line about the steps since the last one; `speed` in targets a second, `left` in seconds."""
        loss = sum(self.pending) / len(self.pending)
        self.pending.clear()
        if not self.world.is_main_process:
            return
        unit = self.task.unit
        counts = {unit: self.tokens_seen, f"{unit}_per_second": round(speed, 1)}
        counts["seconds"] = round(self.seconds, 2)
        share = lr_schedule(self.config, self.step - 1)
        self.metrics.write(self.step, loss=loss, rate_share=share, **counts)
        self.progress.update(self.step, loss, speed, speed * self.flops, left)

    def _validate(self) -> None:
        """Score what is held out, keep the weights if they are the best yet, show a sample."""
        whole = self.world.gather_full(unique_state_dict(self.model))
        if not self.world.is_main_process:
            return
        if self.sharded:
            self.eval_model.load_state_dict(whole, strict=False)
            self.eval_model.to(self.device)
        loss = self.task.validate(self.eval_model)
        if loss < self.best:
            self.best = loss
            save_tensors(self.directory / "model.safetensors", whole)
        sample = self.task.sample(self.eval_model, self.config.sample_tokens)
        if self.sharded:
            self.eval_model.cpu()
        self.metrics.write(self.step, validation_loss=loss, sample=sample)
        self.progress.validation = loss
        self.progress.print(
            f"\nstep {self.step}: {self.task.format_loss(loss)}"
            + (f"; a sample:\n{_indent(sample)}\n" if sample else "")
        )

    def score(self, **options: Any) -> Report:  # noqa: ANN401 (as the task's)
        """Score the best weights on all that is held out, and log it; `judged` has them then."""
        model = self.eval_model.to(self.device)
        path = self.directory / "model.safetensors"
        load_weights(model, load_tensors(path, self.device), path)
        model.eval()
        # In float32, as `eval` does: the same on every machine.
        self.task.config = dataclasses.replace(self.task.config, precision="float32")
        score = self.task.score(model, "validation", **options)
        self.metrics.write(
            self.step, **{f"final_{name}": value for name, value in score.to_json().items()}
        )
        return score

    def save(self) -> Path:
        """Have rank 0 write a checkpoint, the same at any number of processes; all wait for it."""
        folder = self.directory / "checkpoints" / f"step-{self.step}"
        tensors = {
            "model": self.world.gather_full(unique_state_dict(self.model)),
            "optimizer": self.world.gather_full(self.optimizers.state()),
            "random": self._random(),
            "carried": self._carried(),
        }
        if self.world.is_main_process:
            self._write(folder, tensors)
        self.world.barrier()
        return folder

    def _random(self) -> dict[str, Tensor]:
        """The random states: of rank 0 `cpu` and perhaps `cuda`, of rank 1 `cpu.1` and so on."""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        named = {f"{kind}{self._suffix}": state for kind, state in own.items()}
        return {name: state for part in self.world.gather(named) for name, state in part.items()}

    @property
    def _suffix(self) -> str:
        return "" if self.world.is_main_process else f".{self.world.rank}"

    def _carried(self) -> State:
        """The carried state of all rows."""
        parts = self.world.gather(self.state or {})
        names = parts[0] if parts else {}
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _write(self, folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Write a checkpoint beside its place, flush it, rename it; drop older ones."""
        for left_behind in folder.parent.glob("step-*.*"):
            shutil.rmtree(left_behind)
        if folder.exists():
            return
        beside = folder.with_name(folder.name + ".part")
        beside.mkdir(parents=True)
        state = {
            "step": self.step,
            "best": None if math.isinf(self.best) else self.best,
            "pending": self.pending,
            "seen": self.tokens_seen,
            "seconds": self.seconds,
            "data": self.task.fingerprint,
        }
        try:
            for name, part in tensors.items():
                save_tensors(beside / f"{name}.safetensors", part)
            write_atomically(beside / "state.json", json.dumps(state))
            _sync(beside)
            beside.rename(folder)
            _sync(folder.parent)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        for old in checkpoints(self.directory)[:-CHECKPOINTS_KEPT]:
            # Renamed first: a name without a suffix is a whole checkpoint.
            shutil.rmtree(old.rename(old.with_name(old.name + ".old")))

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint; a ValueError says what in it is damaged or does not fit."""
        state = read_json(folder / "state.json")
        if unknown := {"step", "best", "pending", "seen", "seconds", "data"} ^ state.keys():
            raise ValueError(
                f"{folder}: written by another version of tinygpt ({', '.join(sorted(unknown))})"
            )
        if state["data"] != self.task.fingerprint:
            raise ValueError(
                f"{folder}: was trained on another corpus than {self.config.data} holds now "
                f"({state['data'][:12]}, now {self.task.fingerprint[:12]}): it cannot continue exactly"
            )
        path, own = folder / "model.safetensors", unique_state_dict(self.model)
        found = load_tensors(path).items()
        load_weights(
            self.model,
            {name: sharded_like(tensor, own.get(name, tensor)) for name, tensor in found},
            path,
        )
        self.optimizers.load_state(load_tensors(folder / "optimizer.safetensors"))
        random = load_tensors(folder / "random.safetensors")
        self.step, self.pending = state["step"], state["pending"]
        cpu, cuda = f"cpu{self._suffix}", f"cuda{self._suffix}"
        if cpu in random:
            torch.set_rng_state(random[cpu])
        else:  # there were fewer ranks
            self._seed()
        if cuda in random and self.device.type == "cuda":
            torch.cuda.set_rng_state(random[cuda], self.device)
        carried = load_tensors(folder / "carried.safetensors", self.device)
        self.state = {
            name: tensor[self.world.local_rows(len(tensor))] for name, tensor in carried.items()
        } or None
        self.tokens_seen, self.seconds = state["seen"], state["seconds"]
        self.best = math.inf if state["best"] is None else state["best"]


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device. A card fetches it when its turn comes, which it can from pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def model_arguments(run: TrainingConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the run's model: its own, and those of the data's that it knows."""
    known = inspect.signature(model_class(run.model)).parameters
    return {name: value for name, value in given.items() if name in known} | run.model_args


def new_model(run: TrainingConfig, given: dict[str, Any]) -> Model:
    """The run's model with its first weights."""
    return build_model(run.model, model_arguments(run, given))


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (directory / "checkpoints").glob("step-*")
    whole = [path for path in found if path.name.removeprefix("step-").isdigit()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(directory: Path) -> Path | None:
    """The last whole checkpoint, or None."""
    return next(reversed(checkpoints(directory)), None)


def save_training_config(run: TrainingConfig, directory: Path, facts: dict[str, Any]) -> None:
    """Write run.json: the whole configuration and what it ran on. A run exists from here on."""
    content = {"format": FORMAT, "config": dataclasses.asdict(run), **facts}
    write_atomically(directory / "run.json", json.dumps(content, indent=2) + "\n")


def load_training_config(directory: Path) -> TrainingConfig:
    """The configuration in run.json; a ValueError says what is wrong with it."""
    path = directory / "run.json"
    if not path.is_file():
        raise ValueError(f"{directory}: not a training run: it has no run.json")
    content = read_json(path)
    try:
        return TrainingConfig(**content["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: written by another version of tinygpt ({error})") from error


def _sync(directory: Path) -> None:
    """Flush a directory's own entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _indent(text: str) -> str:
    return "\n".join(f"  │ {line}" for line in text.splitlines())

"""The training loop: batch, loss, gradients, optimizer step; at intervals log, validate, save.

A checkpoint contains everything the next step depends on: weights, optimizer state, random
states and the losses that are not logged yet. The data order is a pure function of seed and step.
So a run that was interrupted in any way continues exactly as if it had not been.
"""

import copy
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt import LanguageModel, Model, State
from gpt.checkpoint import load_tensors, load_weights, save_tensors, unique_state_dict
from gpt.device import autocast, copy_to_device, fork_rng, peak_flops, retain_freed_memory, tf32
from training import checkpointing, distributed
from training.compilation import Compilation, should_compile
from training.config import TrainingConfig, new_model
from training.cpu import tune_for_cpu
from training.distributed import SINGLE_PROCESS, World, full_tensor, shard_like
from training.optimizer import Optimizers, lr_schedule
from training.progress import MetricsLogger, Progress, printable
from training.tasks.base import Prefetcher, Report, Task
from training.tracking import Trackers


class Stopped(Exception):
    """Training was stopped by a signal, after saving a checkpoint."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, saved {checkpoint}")
        self.exit_code = 128 + signal_number


class Diverged(Exception):
    """A loss is infinite or not a number."""

    exit_code = 1


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Within this context, append SIGINT and SIGTERM to a list; a second SIGINT interrupts at once."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received[-1:] == [signal.SIGINT] == [number]:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous_handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


class Objective(nn.Module):
    """A module whose forward pass is the model's loss. It is compiled and wrapped; the model is saved."""

    def __init__(self, model: Model, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        # Only the loss of a language model has the option.
        self.options = {"label_smoothing": label_smoothing} if label_smoothing else {}

    def forward(self, *batch: Tensor, state: State | None = None) -> Tensor:
        """Return the loss; with a state, of a batch that continues from it."""
        if state is None:
            return self.model.loss(*batch, **self.options)
        assert isinstance(self.model, LanguageModel)
        return self.model.stateful_loss(state, *batch, **self.options)


COUNTERS = ("step", "best_validation_loss", "unlogged_losses", "tokens_seen", "seconds")
"""Attributes of `Trainer` that trainer_state.json holds."""


class Trainer:
    """Trains one run: a model on a task, with a run directory.

    With several processes each has a trainer. All take the same steps, each on its rows of the
    batch; only rank 0 validates, prints and writes files.
    """

    def __init__(
        self,
        config: TrainingConfig,
        directory: Path,
        task: Task,
        device: torch.device,
        world: World = SINGLE_PROCESS,
    ) -> None:
        retain_freed_memory()
        self.config, self.directory, self.task = config, directory, task
        self.device, self.world = device, world
        torch.manual_seed(config.seed)
        self.model = new_model(config, task.model_args)
        if device.type == "cpu":
            tune_for_cpu(self.model, config.precision, config.context_length)
        self.objective = Objective(self.model, config.label_smoothing)
        self.eval_model = self.model
        """The model that rank 0 validates and samples: a full copy if training is sharded."""
        self.sharded = config.fsdp and world.size > 1
        if self.sharded:
            self.eval_model = copy.deepcopy(self.model) if world.is_main_process else self.model
            distributed.apply_fsdp(self.objective, device, config.precision)
        else:
            self.model.to(device)
        # On a CPU a prefetching thread would take its time from the training step.
        self.prefetcher = Prefetcher(task, config.steps, enabled=device.type != "cpu")
        self.optimizers = Optimizers(self.model, config, device)
        self.flops_per_token = self.model.flops_per_token(task.sequence_length or 1)
        peak = peak_flops(device) if task.sequence_length else None
        self.progress = Progress(config.steps, peak, task.unit)
        self.step = 0
        self.tokens_seen = 0
        """Targets trained on so far."""
        self.seconds = 0.0
        """Training time up to the last line of the log."""
        self.best_validation_loss: float | None = None
        self.state: State | None = None
        """The model's state of each batch row, in stateful training."""
        self.unlogged_losses: list[float] = []
        """Losses of the steps since the last line of the log."""
        self.told_skipped_steps = 0
        self.shown_sample = ""
        """The sample that was printed last."""
        if not world.is_main_process:
            self._seed_rank()

    def _seed_rank(self) -> None:
        """Seed the random numbers, differently for each rank and step."""
        words = np.random.SeedSequence([self.config.seed, self.world.rank, self.step])
        torch.manual_seed(int(words.generate_state(1)[0]))

    @functools.cached_property
    def compilation(self) -> Compilation:
        """The objective of train steps: compiled at the first access, if the config asks for it or it pays.

        Raises ValueError if `--compile on` cannot be fulfilled; `auto` falls back to the eager model.
        """
        fixed_shapes = self.task.sequence_length is not None
        enabled, reason = should_compile(
            self.config, self.model, self.device, self.world.size, fixed_shapes
        )
        if not enabled:
            return Compilation(self.objective, False, reason)
        objective: Callable[..., Tensor] = torch.compile(self.objective, dynamic=not fixed_shapes)
        error = self._try_objective(objective)
        if not self.world.all_reduce_max(int(error is not None)):
            return Compilation(objective, True, reason)
        error = error or "another process cannot compile"
        if self.config.compile == "on":
            raise ValueError(f"--compile on: {error}; --compile off trains without")
        return Compilation(self.objective, False, f"auto: {error}")

    def _try_objective(self, objective: Callable[..., Tensor]) -> str | None:
        """Take the next step without updating any weight; return the first line of its error, if any.

        This compiles a compiled objective, for all later steps: their batches have the same shapes.
        """
        self.prefetcher.batch(self.step)  # its errors are not the compiler's
        tokens_seen, state, was_training = self.tokens_seen, self.state, self.model.training
        self.state = {name: tensor.clone() for name, tensor in state.items()} if state else None
        self.model.train()
        error = None
        with fork_rng(self.device), tf32(self.device):
            try:
                self._backward(objective)
            except Exception as failure:  # of many kinds: no compiler, no Triton, an old GPU, ...
                message = str(failure).strip() or type(failure).__name__
                error = message.splitlines()[0]
        self.tokens_seen, self.state = tokens_seen, state
        self.model.zero_grad()
        self.model.train(was_training)
        return error

    def train(self) -> None:
        """Train from the current step to the last.

        Raises Stopped after SIGINT or SIGTERM, when a checkpoint has been saved, Diverged if a
        loss is not finite, and ValueError if a tracker cannot start.
        """
        objective = self.compilation.objective
        if self.world.size > 1 and not self.sharded:
            objective = distributed.wrap_ddp(objective)
        if self.world.is_main_process:
            trackers = Trackers(self.config, self.directory, self.step)
            self.metrics = MetricsLogger(self.directory, self.step, trackers)
        self.model.train()
        losses: list[Tensor] = []
        first_step, first_tokens, previous_seconds = self.step, self.tokens_seen, self.seconds
        start = time.monotonic()
        try:
            with deferred_signals() as signals:
                while self.step < self.config.steps:
                    losses.append(self.train_step(objective))
                    self.step += 1
                    is_last = self.step == self.config.steps
                    should_log = is_last or self.step % self.config.log_interval == 0
                    should_validate = is_last or self.step % self.config.eval_interval == 0
                    should_save = is_last or self.step % self.config.checkpoint_interval == 0
                    stop_signal = self.world.all_reduce_max(signals[-1] if signals else 0)
                    if should_log or should_validate or should_save or stop_signal:
                        # Reading a loss waits for the device: only where it is needed.
                        mean_losses = self.world.all_reduce_mean(torch.stack(losses))
                        self.unlogged_losses += mean_losses.tolist()
                        losses.clear()
                        self._check_finite()
                    if should_log:
                        elapsed = time.monotonic() - start
                        self.seconds = previous_seconds + elapsed
                        seconds_per_step = elapsed / (self.step - first_step)
                        self._log(
                            tokens_per_second=(self.tokens_seen - first_tokens) / elapsed,
                            seconds_left=seconds_per_step * (self.config.steps - self.step),
                        )
                    if should_validate:
                        self._validate()
                    if should_save or stop_signal:
                        checkpoint = self.save_checkpoint()
                        if stop_signal and not is_last:
                            raise Stopped(stop_signal, checkpoint)
        except BaseException as error:
            if self.world.is_main_process:
                self.metrics.trackers.close(getattr(error, "exit_code", 1))
            raise
        finally:
            self.prefetcher.close()

    def train_step(self, objective: Callable[..., Tensor]) -> Tensor:
        """Take one optimizer step and return its loss; the mean over processes is the batch's loss.

        Operations are only queued on the device: nothing here waits for it, except in float16.
        """
        with tf32(self.device):
            loss = self._backward(objective)
            self.optimizers.step(self.step)
        return loss

    def _backward(self, objective: Callable[..., Tensor]) -> Tensor:
        """Add the gradients of the next step's batch to the parameters' and return its loss."""
        batch = self.prefetcher.batch(self.step)
        num_targets = int((batch[-1] != -100).sum())
        self.tokens_seen += num_targets
        local_rows = self.world.local_slice(len(batch[0]))
        batch = tuple(array[local_rows] for array in batch)
        if self.config.stateful and not self.task.continues_previous(self.step):
            assert isinstance(self.model, LanguageModel)
            state = self.model.init_state(len(batch[0]), self.config.context_length)
            self.state = {name: full_tensor(tensor) for name, tensor in state.items()}
        num_micro_batches = self.config.gradient_accumulation_steps
        # Weighted by their share of the targets, micro-batch means add up to the batch's mean.
        # The world's size cancels the averaging over processes.
        weights = [
            (targets != -100).sum() / num_targets * self.world.size
            for targets in np.array_split(batch[-1], num_micro_batches)
        ]
        tensors = [copy_to_device(torch.from_numpy(array), self.device) for array in batch]
        splits = [tensor.tensor_split(num_micro_batches) for tensor in tensors]
        total_loss = torch.zeros((), device=self.device)
        for i, (weight, *micro_batch) in enumerate(zip(weights, *splits, strict=True), 1):
            with nullcontext() if i == num_micro_batches else distributed.no_sync(objective):
                with autocast(self.device, self.config.precision):
                    loss = objective(*micro_batch, state=self.state) * weight
                self.optimizers.scaler.scale(loss).backward()
            total_loss += loss.detach()
        return total_loss

    def _check_finite(self) -> None:
        """Raise Diverged if the loss of a step since the last line of the log is not finite."""
        first_step = self.step - len(self.unlogged_losses) + 1
        for step, loss in enumerate(self.unlogged_losses, first_step):
            if not math.isfinite(loss):
                checkpoint = checkpointing.newest_checkpoint(self.directory) or "none yet"
                raise Diverged(
                    f"the loss of step {step} is not finite; the last good checkpoint is "
                    f"{checkpoint}: try a lower --learning-rate{self._float32_advice}"
                )
        if self.optimizers.loss_scale < 1:
            raise Diverged(
                f"the gradients of {self.optimizers.skipped_steps} steps overflowed float16, also "
                f"without a loss scale: try a lower --learning-rate{self._float32_advice}"
            )

    @property
    def _float32_advice(self) -> str:
        return " or --precision float32" if self.optimizers.scaler.is_enabled() else ""

    def _log(self, tokens_per_second: float, seconds_left: float) -> None:
        """Log the mean loss since the last line of the log."""
        loss = sum(self.unlogged_losses) / len(self.unlogged_losses)
        self.unlogged_losses.clear()
        if not self.world.is_main_process:
            return
        unit, lr_fraction = self.task.unit, lr_schedule(self.config, self.step - 1)
        tokens = {unit: self.tokens_seen, f"{unit}_per_second": round(tokens_per_second, 1)}
        seconds = round(self.seconds, 2)
        scaling = {}
        if self.optimizers.scaler.is_enabled():
            scaling = {
                "loss_scale": self.optimizers.loss_scale,
                "skipped_steps": self.optimizers.skipped_steps,
            }
            self._tell_skipped_steps()
        self.metrics.log(
            self.step, loss=loss, lr_fraction=lr_fraction, **tokens, seconds=seconds, **scaling
        )
        flops = tokens_per_second * self.flops_per_token
        self.progress.update(self.step, loss, tokens_per_second, flops, seconds_left)

    def _tell_skipped_steps(self) -> None:
        """Print how many optimizer steps were skipped, if more than were told before."""
        count = self.optimizers.skipped_steps
        if count > self.told_skipped_steps:
            self.told_skipped_steps = count
            self.progress.print(
                f"step {self.step}: skipped {count} optimizer steps so far, whose gradients "
                f"overflowed float16; loss scale {self.optimizers.loss_scale:g}"
            )

    def _validate(self) -> None:
        """Compute the validation loss, save the weights if they are the best, show a sample."""
        weights = self.world.gather_full_tensors(unique_state_dict(self.model))
        if not self.world.is_main_process:
            return
        if self.sharded:
            self.eval_model.load_state_dict(weights, strict=False)
            self.eval_model.to(self.device)
        loss = self.task.validate(self.eval_model)
        best = math.inf if self.best_validation_loss is None else self.best_validation_loss
        if loss < best:
            self.best_validation_loss = loss
            save_tensors(self.directory / "model.safetensors", weights)
        sample = self.task.sample(self.eval_model, self.config.sample_tokens)
        if self.sharded:
            self.eval_model.cpu()
        by_source = {"validation_losses": dict(it)} if (it := self.task.source_losses) else {}
        self.metrics.log(self.step, validation_loss=loss, **by_source, sample=sample)
        self.progress.validation_loss = loss
        message = f"\nstep {self.step}: {self.task.format_loss(loss)}"
        is_in_report = self.task.sample_in_report and self.step == self.config.steps
        if sample and sample != self.shown_sample and not is_in_report:
            self.shown_sample = sample
            lines = "\n".join(f"  │ {line}" for line in printable(sample).splitlines())
            message += f"; a sample:\n{lines}"
        self.progress.print(message)

    def score(self, **options: Any) -> Report:  # noqa: ANN401 (options of Task.score)
        """Load the best weights into `eval_model`, score the whole validation split, log the score.

        It is the last that trackers get.
        """
        model = self.eval_model.to(self.device)
        path = self.directory / "model.safetensors"
        load_weights(model, load_tensors(path), path)
        model.eval()
        # In float32, as `tinygpt eval`: the same on every machine.
        self.task.config = dataclasses.replace(self.task.config, precision="float32")
        report = self.task.score(model, "validation", **options)
        final = {f"final_{name}": value for name, value in report.to_json().items()}
        self.metrics.log(self.step, **final)
        self.metrics.trackers.close()
        return report

    def save_checkpoint(self) -> Path:
        """Let rank 0 write a checkpoint; all wait for it. It can be loaded by any number of processes."""
        rng_states = self.world.gather(checkpointing.rng_state(self.device, self.world.rank))
        states = self.world.gather(self.state or {})
        tensors = {
            "model": self.world.gather_full_tensors(unique_state_dict(self.model)),
            "optimizer": self.world.gather_full_tensors(self.optimizers.state_dict()),
        }
        if self.world.is_main_process:
            tensors["rng_state"] = {k: v for rng_state in rng_states for k, v in rng_state.items()}
            joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
            tensors["sequence_state"] = joined
            trainer_state = {name: getattr(self, name) for name in COUNTERS}
            trainer_state["data_fingerprint"] = self.task.fingerprint
            trainer_state["grad_scaler"] = self.optimizers.scaler_state()
            checkpointing.write_checkpoint(self.directory, tensors, trainer_state)
        self.world.barrier()
        return self.directory / "checkpoints" / f"step-{self.step}"

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError if it is damaged or does not fit the run."""
        self.restore(path, *checkpointing.read_checkpoint(path))

    def load_weights(self, tensors: dict[str, Tensor], source: Path) -> None:
        """Copy full tensors to the model, sharded as it is; see `gpt.checkpoint.load_weights`."""
        own = unique_state_dict(self.model)
        sharded = {name: shard_like(value, own.get(name, value)) for name, value in tensors.items()}
        load_weights(self.model, sharded, source)

    def restore(
        self, path: Path, tensors: checkpointing.Tensors, trainer_state: dict[str, Any]
    ) -> None:
        """Continue from what `read_checkpoint` returned for the path."""
        fingerprint = trainer_state["data_fingerprint"]
        if fingerprint != self.task.fingerprint:
            raise ValueError(
                f"{path}: was trained on another corpus than {self.config.data} contains now "
                f"({fingerprint[:12]}, now {self.task.fingerprint[:12]}): it cannot continue exactly"
            )
        self.load_weights(tensors["model"], path / "model.safetensors")
        self.optimizers.load_state_dict(tensors["optimizer"])
        for name in COUNTERS:
            setattr(self, name, trainer_state[name])
        self.optimizers.load_scaler_state(trainer_state.get("grad_scaler", {}))
        rank = self.world.rank
        if not checkpointing.restore_rng_state(tensors["rng_state"], self.device, rank):
            self._seed_rank()  # the checkpoint was written by fewer processes
        rows = self.world.local_slice(self.config.batch_size)
        states = tensors["sequence_state"].items()
        self.state = {name: tensor[rows].to(self.device) for name, tensor in states} or None

"""The training loop: batch, loss, gradients, optimizer step; at intervals log, validate, save.

A checkpoint contains everything the next step depends on: weights, optimizer state, random
states and the losses that are not logged yet. The data order is a pure function of seed and step.
So a run that was interrupted in any way continues exactly as if it had not been.
"""

import copy
import dataclasses
import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt import LanguageModel, Model, State
from gpt.checkpoint import load_tensors, load_weights, read_json, save_tensors, unique_state_dict
from gpt.device import autocast, peak_flops, retain_freed_memory
from training.checkpointing import (
    newest_checkpoint,
    restore_rng_state,
    rng_state,
    write_checkpoint,
)
from training.config import TrainingConfig, new_model
from training.distributed import (
    SINGLE_PROCESS,
    World,
    apply_fsdp,
    full_tensor,
    no_sync,
    shard_like,
    wrap_ddp,
)
from training.metrics_logger import MetricsLogger
from training.optimizer import Optimizers, lr_schedule
from training.progress import Progress
from training.signals import SignalHandler
from training.tasks.base import Prefetcher, Report, Task


class Stopped(Exception):
    """Training was stopped by a signal, after saving a checkpoint."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, saved {checkpoint}")
        self.exit_code = 128 + signal_number


class Diverged(Exception):
    """A loss is infinite or not a number."""


class Objective(nn.Module):
    """A module whose forward pass is the model's loss. It is compiled and wrapped; the model is saved."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor, state: State | None = None) -> Tensor:
        """Return the scalar to minimize; with a state, of a batch that continues from it."""
        if state is None:
            return self.model.loss(*batch)
        assert isinstance(self.model, LanguageModel)
        return self.model.stateful_loss(state, *batch)


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
        self.objective = Objective(self.model)
        self.eval_model = self.model
        """The model that rank 0 validates and samples: a full copy if training is sharded."""
        self.sharded = config.fsdp and world.size > 1
        if self.sharded:
            self.eval_model = copy.deepcopy(self.model) if world.is_main_process else self.model
            apply_fsdp(self.objective, device, config.precision)
        else:
            self.model.to(device)
        # On a CPU a prefetching thread would take its time from the training step.
        self.prefetcher = Prefetcher(task, config.steps, enabled=device.type != "cpu")
        self.optimizers = Optimizers(self.model, config, device)
        self.flops_per_token = self.model.flops_per_token(task.sequence_length or 1)
        peak = peak_flops(device) if task.sequence_length else None
        self.progress = Progress(config.steps, peak, task.unit)
        self.signals = SignalHandler()
        self.step = 0
        self.tokens_seen = 0
        """Targets trained on so far."""
        self.seconds = 0.0
        """Training time up to the last line of the log."""
        self.best_validation_loss = math.inf
        self.state: State | None = None
        """The model's state of each batch row, in stateful training."""
        self.unlogged_losses: list[float] = []
        """Losses of the steps since the last line of the log."""
        if not world.is_main_process:
            self._seed_rank()

    def _seed_rank(self) -> None:
        """Seed the random numbers of this process, differently for each rank and step."""
        words = np.random.SeedSequence([self.config.seed, self.world.rank, self.step])
        torch.manual_seed(int(words.generate_state(1)[0]))

    def train(self) -> None:
        """Train from the current step to the last.

        Raises:
            Stopped: After SIGINT or SIGTERM, when a checkpoint has been saved.
            Diverged: If a loss is not finite.
        """
        objective: Callable[..., Tensor] = self.objective
        if self.config.compile:
            objective = torch.compile(objective)
        if self.world.size > 1 and not self.sharded:
            objective = wrap_ddp(objective)
        if self.world.is_main_process:
            self.metrics = MetricsLogger(self.directory, self.config.tensorboard, self.step)
        self.model.train()
        losses: list[Tensor] = []
        first_step, first_tokens, previous_seconds = self.step, self.tokens_seen, self.seconds
        start = time.monotonic()
        try:
            with self.signals.installed():
                while self.step < self.config.steps:
                    losses.append(self.train_step(objective))
                    self.step += 1
                    should_log = self._is_due(self.config.log_interval)
                    should_validate = self._is_due(self.config.eval_interval)
                    should_save = self._is_due(self.config.checkpoint_interval)
                    stop_signal = self.world.all_reduce_max(self.signals.received or 0)
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
                        if stop_signal and self.step < self.config.steps:
                            raise Stopped(stop_signal, checkpoint)
        finally:
            self.prefetcher.close()
            if self.world.is_main_process:
                self.metrics.close()

    def _is_due(self, interval: int) -> bool:
        """Whether this step is the last or a multiple of `interval`."""
        return self.step % interval == 0 or self.step == self.config.steps

    def train_step(self, objective: Callable[..., Tensor]) -> Tensor:
        """Take one optimizer step and return its loss; the mean over processes is the batch's loss.

        Operations are only queued on the device: nothing here waits for it.
        """
        batch = self.prefetcher.batch(self.step)
        num_targets = int((batch[-1] != -100).sum())
        self.tokens_seen += num_targets
        local_rows = self.world.local_slice(len(batch[0]))
        batch = tuple(array[local_rows] for array in batch)
        if not self.task.continues_previous(self.step):
            self.state = self._init_state(len(batch[0]))
        num_micro_batches = self.config.gradient_accumulation_steps
        # Weighted by their share of the targets, micro-batch means add up to the batch's mean.
        # The world's size cancels the averaging over processes.
        weights = [
            (targets != -100).sum() / num_targets * self.world.size
            for targets in np.array_split(batch[-1], num_micro_batches)
        ]
        tensors = [_to_device(array, self.device) for array in batch]
        micro_batches = zip(
            *(tensor.tensor_split(num_micro_batches) for tensor in tensors), strict=True
        )
        total_loss = torch.zeros((), device=self.device)
        for i, (weight, micro_batch) in enumerate(zip(weights, micro_batches, strict=True), 1):
            with nullcontext() if i == num_micro_batches else no_sync(objective):
                with autocast(self.device, self.config.precision):
                    loss = objective(*micro_batch, state=self.state) * weight
                loss.backward()
            total_loss += loss.detach()
        self.optimizers.step(self.step)
        return total_loss

    def _init_state(self, batch_size: int) -> State | None:
        """Return an empty model state in stateful training, otherwise None."""
        if not self.config.stateful:
            return None
        assert isinstance(self.model, LanguageModel)
        state = self.model.init_state(batch_size, self.config.context_length)
        return {name: full_tensor(tensor) for name, tensor in state.items()}

    def _check_finite(self) -> None:
        """Raise Diverged for the first step whose loss is not finite."""
        first_step = self.step - len(self.unlogged_losses) + 1
        for step, loss in enumerate(self.unlogged_losses, first_step):
            if not math.isfinite(loss):
                checkpoint = newest_checkpoint(self.directory)
                raise Diverged(
                    f"the loss of step {step} is not finite; the last good checkpoint is "
                    f"{checkpoint or 'none yet'}: try a lower --learning-rate"
                )

    def _log(self, tokens_per_second: float, seconds_left: float) -> None:
        """Log the mean loss since the last line of the log."""
        loss = sum(self.unlogged_losses) / len(self.unlogged_losses)
        self.unlogged_losses.clear()
        if not self.world.is_main_process:
            return
        unit = self.task.unit
        self.metrics.log(
            self.step,
            loss=loss,
            lr_fraction=lr_schedule(self.config, self.step - 1),
            **{unit: self.tokens_seen, f"{unit}_per_second": round(tokens_per_second, 1)},
            seconds=round(self.seconds, 2),
        )
        flops = tokens_per_second * self.flops_per_token
        self.progress.update(self.step, loss, tokens_per_second, flops, seconds_left)

    def _validate(self) -> None:
        """Compute the validation loss, save the weights if they are the best, show a sample."""
        weights = self.world.gather_full_tensors(unique_state_dict(self.model))
        if not self.world.is_main_process:
            return
        if self.sharded:
            self.eval_model.load_state_dict(weights, strict=False)
            self.eval_model.to(self.device)
        loss = self.task.validate(self.eval_model)
        if loss < self.best_validation_loss:
            self.best_validation_loss = loss
            save_tensors(self.directory / "model.safetensors", weights)
        sample = self.task.sample(self.eval_model, self.config.sample_tokens)
        if self.sharded:
            self.eval_model.cpu()
        self.metrics.log(self.step, validation_loss=loss, sample=sample)
        self.progress.validation_loss = loss
        self.progress.print(
            f"\nstep {self.step}: {self.task.format_loss(loss)}"
            + (f"; a sample:\n{_indent(sample)}\n" if sample else "")
        )

    def score(self, **options: Any) -> Report:  # noqa: ANN401 (options of Task.score)
        """Load the best weights into `eval_model`, score the whole validation split, log the score."""
        model = self.eval_model.to(self.device)
        path = self.directory / "model.safetensors"
        load_weights(model, load_tensors(path, self.device), path)
        model.eval()
        # In float32, as `tinygpt eval`: the same on every machine.
        self.task.config = dataclasses.replace(self.task.config, precision="float32")
        report = self.task.score(model, "validation", **options)
        self.metrics.log(
            self.step, **{f"final_{name}": value for name, value in report.to_json().items()}
        )
        return report

    def save_checkpoint(self) -> Path:
        """Let rank 0 write a checkpoint; all wait for it. It can be loaded by any number of processes."""
        rng_states = self.world.gather(rng_state(self.device, self.world.rank))
        tensors = {
            "model": self.world.gather_full_tensors(unique_state_dict(self.model)),
            "optimizer": self.world.gather_full_tensors(self.optimizers.state_dict()),
            "rng_state": {name: state for states in rng_states for name, state in states.items()},
            "sequence_state": _concatenate(self.world.gather(self.state or {})),
        }
        best = self.best_validation_loss
        trainer_state = {
            "step": self.step,
            "best_validation_loss": None if math.isinf(best) else best,
            "unlogged_losses": self.unlogged_losses,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "data_fingerprint": self.task.fingerprint,
        }
        if self.world.is_main_process:
            write_checkpoint(self.directory, tensors, trainer_state)
        self.world.barrier()
        return self.directory / "checkpoints" / f"step-{self.step}"

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError if it is damaged or does not fit the run."""
        trainer_state = read_json(path / "trainer_state.json")
        fingerprint = trainer_state["data_fingerprint"]
        if fingerprint != self.task.fingerprint:
            raise ValueError(
                f"{path}: was trained on another corpus than {self.config.data} contains now "
                f"({fingerprint[:12]}, now {self.task.fingerprint[:12]}): it cannot continue exactly"
            )
        own = unique_state_dict(self.model)
        weights = {
            name: shard_like(tensor, own.get(name, tensor))
            for name, tensor in load_tensors(path / "model.safetensors").items()
        }
        load_weights(self.model, weights, path / "model.safetensors")
        self.optimizers.load_state_dict(load_tensors(path / "optimizer.safetensors"))
        self.step = trainer_state["step"]
        self.unlogged_losses = trainer_state["unlogged_losses"]
        self.tokens_seen, self.seconds = trainer_state["tokens_seen"], trainer_state["seconds"]
        best = trainer_state["best_validation_loss"]
        self.best_validation_loss = math.inf if best is None else best
        rng_states = load_tensors(path / "rng_state.safetensors")
        if not restore_rng_state(rng_states, self.device, self.world.rank):
            self._seed_rank()  # the checkpoint was written by fewer processes
        sequence_state = load_tensors(path / "sequence_state.safetensors", self.device)
        self.state = {
            name: tensor[self.world.local_slice(len(tensor))]
            for name, tensor in sequence_state.items()
        } or None


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to the device; to a GPU without waiting, from pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _concatenate(states: list[State]) -> State:
    """Join the states of the processes along the batch axis; an empty list gives an empty state."""
    names = states[0] if states else {}
    return {name: torch.cat([state[name] for state in states]) for name in names}


def _indent(text: str) -> str:
    return "\n".join(f"  │ {line}" for line in text.splitlines())

"""The training loop, and that a resumed run equals an uninterrupted one exactly."""

import dataclasses
import hashlib
import inspect
import math
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt.checkpoint import load_tensors, model_class, save_tensors
from tests.training.helpers import make_trainer, read_log, write_corpus
from tokenizer import byte_tokenizer
from training.checkpointing import list_checkpoints, newest_checkpoint
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, TextChunk, open_corpus
from training.presets import PRESETS
from training.tasks import TASKS
from training.tasks.base import Prefetcher
from training.tasks.tables import TABULAR_TASKS
from training.tasks.text import Text
from training.trainer import Diverged, Stopped, Trainer

TINY = TrainingConfig(
    preset="tiny",
    model_args={"width": 16, "depth": 2, "heads": 2, "dropout": 0.1},
    steps=12,
    batch_size=4,
    context_length=16,
    gradient_accumulation_steps=2,
    warmup_steps=2,
    eval_interval=4,
    eval_tokens=64,
    checkpoint_interval=3,
    log_interval=2,
    sample_tokens=4,
    device="cpu",
)
VARIANTS = {
    "muon": TINY,
    "adamw": dataclasses.replace(
        TINY, optimizer="adamw", learning_rate=1e-3, gradient_accumulation_steps=1
    ),
    "tied": dataclasses.replace(TINY, model_args=TINY.model_args | {"tied": True}),
    "bfloat16": dataclasses.replace(TINY, precision="bfloat16"),
    "float16": dataclasses.replace(TINY, precision="float16"),
    "stateful-sgd": dataclasses.replace(
        TINY,
        model="lstm",
        model_args={"width": 16},
        optimizer="sgd",
        stateful=True,
        gradient_accumulation_steps=1,
        cooldown_fraction=0.5,
        step_decays=2,
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pair_corpus(tmp_path_factory):
    pairs = [("dog", "ami"), ("cat", "lui"), ("is", "est")]
    writer = CorpusWriter(folder := tmp_path_factory.mktemp("pairs"), byte_tokenizer())
    for split in ("train", "validation"):
        writer.write(split, [TextChunk(source, True, target) for source, target in pairs * 6])
    writer.close("dogs and cats", ("en", "fr"))
    return open_corpus(folder, sentence_pairs=True)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoint_tensors(directory):
    newest = newest_checkpoint(directory)
    return {
        (path.name, name): tensor
        for path in newest.glob("*.safetensors")
        for name, tensor in load_tensors(path).items()
    }


def assert_resumed_equals_uninterrupted(config, task, stop_step, folder, device="cpu"):
    """Stop a run by a signal in `stop_step`, resume it, and compare it with an uninterrupted run."""

    def trainer(name):
        (folder / name).mkdir(exist_ok=True)
        return Trainer(config, folder / name, task, torch.device(device))

    trainer("uninterrupted").train()

    first = trainer("resumed")
    train_step = first.train_step

    def train_step_with_signal(objective):
        if first.step == stop_step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(objective)

    first.train_step = train_step_with_signal
    with pytest.raises(Stopped) as stopped:
        first.train()
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert newest_checkpoint(folder / "resumed").name == f"step-{stop_step}"

    torch.manual_seed(999)  # must have no effect
    second = trainer("resumed")
    second.load_checkpoint(newest_checkpoint(folder / "resumed"))
    second.train()
    assert read_log(folder / "resumed") == read_log(folder / "uninterrupted")
    resumed = checkpoint_tensors(folder / "resumed")
    uninterrupted = checkpoint_tensors(folder / "uninterrupted")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
    best = "model.safetensors"
    assert sha256(folder / "resumed" / best) == sha256(folder / "uninterrupted" / best)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_step", [1, 3, 5, 8, 11])
def test_resumed_run_equals_uninterrupted_run(variant, stop_step, corpus, tmp_path):
    config = VARIANTS[variant]
    assert_resumed_equals_uninterrupted(config, Text(config, corpus), stop_step, tmp_path)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
def test_resumed_compiled_run_equals_uninterrupted_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    model_args = TINY.model_args | {"depth": 1}
    config = dataclasses.replace(TINY, model_args=model_args, compile="on", precision="bfloat16")
    assert_resumed_equals_uninterrupted(config, Text(config, corpus), 5, tmp_path)


def shrink(config):
    """Return a preset with a tiny model and few steps; task, optimizers and schedule stay."""
    parameters = inspect.signature(model_class(config.model)).parameters
    tiny_args = {"width": 8, "depth": 1, "heads": 2, "hidden": 8}
    if config.task in TABULAR_TASKS:
        tiny_args = {}
    return dataclasses.replace(
        config,
        model_args=config.model_args | {k: v for k, v in tiny_args.items() if k in parameters},
        steps=4,
        batch_size=4,
        context_length=8,
        gradient_accumulation_steps=1 if config.stateful else 2,
        warmup_steps=min(config.warmup_steps, 2),
        eval_interval=2,
        eval_tokens=16,
        checkpoint_interval=4,
        log_interval=1,
        sample_tokens=2,
        compile="off",
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resumes_exactly(name, corpus, pair_corpus, tmp_path):
    config = shrink(PRESETS[name])
    if config.task in TABULAR_TASKS:
        task = TABULAR_TASKS[config.task].open(config, None, True)
    else:
        task = TASKS[config.task](config, pair_corpus if config.task == "translation" else corpus)
    assert_resumed_equals_uninterrupted(config, task, 3, tmp_path)


def make_prefetching_trainer(config, directory, corpus):
    """A trainer that prefetches its batches, as on a GPU."""
    trainer = make_trainer(config, directory, corpus)
    trainer.prefetcher = Prefetcher(trainer.task, config.steps, enabled=True)
    return trainer


def prefetcher_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("variant", ["muon", "stateful-sgd"])
def test_prefetched_batches_are_the_same(variant, corpus, tmp_path):
    config = VARIANTS[variant]
    make_trainer(config, tmp_path / "plain", corpus).train()
    made = []
    trainer = make_prefetching_trainer(config, tmp_path / "prefetched", corpus)
    train_step, make_batch = trainer.train_step, trainer.task.batch

    def record_batch(step):
        made.append((step, threading.current_thread()))
        return make_batch(step)

    def check_step(objective):
        loss = train_step(objective)
        # The next batch is already being made.
        next_step = trainer.step + 1
        assert next_step in trainer.prefetcher.pending or next_step == config.steps
        return loss

    trainer.task.batch, trainer.train_step = record_batch, check_step
    trainer.train()
    assert read_log(tmp_path / "prefetched") == read_log(tmp_path / "plain")
    assert [step for step, _ in made] == list(range(config.steps))
    assert threading.current_thread() not in [thread for _, thread in made]
    assert not prefetcher_threads()

    # A resumed run asks for a batch that was not prefetched.
    resumed = make_prefetching_trainer(config, tmp_path / "prefetched", corpus)
    resumed.load_checkpoint(tmp_path / "prefetched" / "checkpoints" / "step-9")
    resumed.train()
    assert read_log(tmp_path / "prefetched") == read_log(tmp_path / "plain")


def test_error_in_a_prefetched_batch_is_raised_at_its_step(corpus, tmp_path):
    trainer = make_prefetching_trainer(TINY, tmp_path / "run", corpus)
    make_batch = trainer.task.batch

    def fail_at_5(step):
        if step == 5:
            raise FileNotFoundError(2, "No such file or directory", "train.bin")
        return make_batch(step)

    trainer.task.batch = fail_at_5
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        trainer.train()
    assert trainer.step == 5
    assert not prefetcher_threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "float16"])
def test_train_step_does_not_wait_for_the_gpu(variant, corpus, tmp_path):
    config = VARIANTS[variant]
    trainer = Trainer(config, tmp_path, Text(config, corpus), torch.device("cuda"))
    try:
        for step in range(config.steps):
            trainer.train_step(trainer.objective)
            trainer.step += 1
            if step == 3:  # the first steps may wait: they allocate and compile
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradient_accumulation_does_not_change_the_losses(corpus, tmp_path):
    model_args = TINY.model_args | {"dropout": 0.0}
    config = dataclasses.replace(TINY, model_args=model_args, precision="float32", steps=4)
    losses = []
    for num_micro_batches in (1, 2, 4):
        directory = tmp_path / str(num_micro_batches)
        split = dataclasses.replace(config, gradient_accumulation_steps=num_micro_batches)
        make_trainer(split, directory, corpus).train()
        losses.append([line["loss"] for line in read_log(directory) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize(
    ("model", "model_args", "stateful"),
    [
        ("lstm", {"width": 16}, True),
        ("gpt", {"width": 16, "depth": 1, "heads": 2}, False),
        ("attention", {"width": 16}, False),  # has a `logits` of its own
    ],
)
def test_label_smoothing_is_in_the_training_loss_only(
    model, model_args, stateful, corpus, tmp_path
):
    config = dataclasses.replace(
        TINY,
        model=model,
        model_args=model_args,
        stateful=stateful,
        gradient_accumulation_steps=1,
        precision="float32",
        label_smoothing=0.2,
    )
    trainer = make_trainer(config, tmp_path, corpus)
    features_BTD, targets_BT = trainer.model.features_and_targets(
        *map(torch.from_numpy, trainer.task.batch(0))
    )
    logits_NV, targets_N = trainer.model.logits(features_BTD).flatten(0, 1), targets_BT.flatten()
    expected = F.cross_entropy(logits_NV, targets_N, label_smoothing=0.2)
    plain = dataclasses.replace(config, label_smoothing=0.0)
    plain_trainer = make_trainer(plain, tmp_path, corpus)
    assert trainer.task.validate(trainer.model) == plain_trainer.task.validate(plain_trainer.model)
    torch.testing.assert_close(trainer.train_step(trainer.objective), expected.detach())


def test_training_lowers_the_loss_and_saves_the_best_weights(corpus, tmp_path):
    config = dataclasses.replace(TINY, steps=120, eval_interval=20, eval_tokens=10_000)
    trainer = make_trainer(config, tmp_path / "run", corpus)
    trainer.train()
    log = read_log(tmp_path / "run")
    losses = [line["validation_loss"] for line in log if "sample" in line]
    assert log[0]["loss"] > 4
    assert losses[-1] < 1.6
    assert trainer.best_validation_loss == min(losses)


def test_only_complete_checkpoints_count_and_two_are_kept(corpus, tmp_path):
    trainer = make_trainer(TINY, tmp_path / "run", corpus)
    trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-9", "step-12"]
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-15.part").mkdir()
    (folder / "step-6.old").mkdir()
    assert newest_checkpoint(tmp_path / "run").name == "step-12"
    trainer.step = 13
    trainer.save_checkpoint()
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-13"]


def test_full_disk_leaves_the_last_checkpoint_intact(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(TINY, tmp_path / "run", corpus)
    trainer.train()
    newest = newest_checkpoint(tmp_path / "run")
    before = {path.name: sha256(path) for path in newest.iterdir()}
    trainer.step = 99
    code = (
        "import resource, signal, sys; from pathlib import Path; import torch;"
        "from gpt.checkpoint import save_tensors;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "save_tensors(Path(sys.argv[1]), {'a': torch.zeros(10_000)})"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, newest / "model.safetensors"], capture_output=True, text=True
    )
    assert "OSError" in process.stderr
    assert "model.safetensors" in process.stderr.splitlines()[-1]

    def fail_at_the_optimizer(path, tensors):
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device", str(path))
        save_tensors(path, tensors)

    monkeypatch.setattr("training.checkpointing.save_tensors", fail_at_the_optimizer)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint()
    after = {path.name: sha256(path) for path in newest.iterdir() if path.suffix != ".part"}
    assert after == before
    assert newest_checkpoint(tmp_path / "run") == newest
    assert not list(newest.parent.glob("step-99*"))


def test_loss_that_is_not_finite_stops_and_names_the_last_checkpoint(corpus, tmp_path):
    trainer = make_trainer(TINY, tmp_path / "run", corpus)
    train_step = trainer.train_step

    def nan_at_7(objective):
        loss = train_step(objective)
        return loss * math.nan if trainer.step == 7 else loss

    trainer.train_step = nan_at_7
    with pytest.raises(Diverged, match=r"loss of step 8 is not finite.*step-6.*--learning-rate"):
        trainer.train()
    assert newest_checkpoint(tmp_path / "run").name == "step-6"


def test_skipped_steps_are_told_and_survive_a_resume(corpus, tmp_path, capsys):
    config = dataclasses.replace(TINY, precision="float16", steps=6)
    trainer = make_trainer(config, tmp_path / "run", corpus)
    trainer.optimizers.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    trainer.train()
    log = [line for line in read_log(tmp_path / "run") if "skipped_steps" in line]
    skipped = log[-1]["skipped_steps"]
    assert skipped >= 4
    assert log[-1]["loss_scale"] == 2.0 ** (120 - skipped)
    assert f"skipped {skipped} optimizer steps so far, whose grad" in capsys.readouterr().out
    resumed = make_trainer(config, tmp_path / "run", corpus)
    resumed.load_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert resumed.optimizers.scaler_state() == trainer.optimizers.scaler_state()
    in_float32 = dataclasses.replace(config, precision="float32")
    make_trainer(in_float32, tmp_path / "run", corpus).load_checkpoint(
        newest_checkpoint(tmp_path / "run")
    )


def test_gradients_that_overflow_at_every_scale_stop_the_run(corpus, tmp_path):
    config = dataclasses.replace(TINY, precision="float16")
    trainer = make_trainer(config, tmp_path / "run", corpus)
    trainer.optimizers.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    parameter = next(trainer.model.parameters())
    parameter.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(Diverged, match=r"overflowed float16.*or --precision float32"):
        trainer.train()


def test_resuming_on_another_corpus_is_refused(corpus, tmp_path):
    make_trainer(TINY, tmp_path / "run", corpus).train()
    trainer = make_trainer(
        TINY, tmp_path / "run", dataclasses.replace(corpus, fingerprint="0" * 64)
    )
    with pytest.raises(ValueError, match="another corpus"):
        trainer.load_checkpoint(newest_checkpoint(tmp_path / "run"))


def test_tensorboard_gets_the_values_of_the_log(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(dataclasses.replace(TINY, tensorboard=True), tmp_path / "run", corpus)
    trainer.train()
    trainer.score()
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    (final,) = events.Scalars("final_loss")
    assert final.value == pytest.approx(read_log(tmp_path / "run")[-1]["final_loss"])
    losses = [line["loss"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_stateful_training_continues_the_state_of_every_row(corpus, tmp_path):
    config = dataclasses.replace(
        VARIANTS["stateful-sgd"], precision="float32", learning_rate=1e-12, steps=3
    )
    trainer = make_trainer(config, tmp_path, corpus)
    trainer.optimizers.step = lambda step: trainer.model.zero_grad()  # the weights stay
    trainer.train()
    batches = [trainer.task.batch(step)[0] for step in range(3)]
    state = trainer.model.init_state(config.batch_size, 48)
    trainer.model.features(torch.from_numpy(np.concatenate(batches, axis=1)), state)
    for name, tensor in state.items():
        torch.testing.assert_close(trainer.state[name], tensor)


def test_every_epoch_starts_with_an_empty_state(corpus):
    task = Text(VARIANTS["stateful-sgd"], corpus)
    epoch = task.batches.batches_per_epoch
    assert [step for step in range(2 * epoch + 1) if not task.continues_previous(step)] == [
        0,
        epoch,
        2 * epoch,
    ]
    assert (task.batch(0)[0] == task.batch(epoch)[0]).all()


@pytest.mark.long
def test_run_killed_five_times_equals_uninterrupted_run(tmp_path, request):
    """The command itself, ended by SIGKILL at random moments: equal losses and weights."""
    text = tmp_path / "text.txt"
    rng = random.Random(1)
    text.write_text("".join(f"{rng.choice('abc')} says {rng.random():.3f}\n" for _ in range(4000)))
    environment = os.environ | {
        "PYTHONPATH": str(request.config.rootpath),
        "TINYGPT_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, "-m", "training", "train"]
    options = (
        "gpt-nano --tokenizer bytes --steps 200 --batch-size 4 --context-length 64 --width 32 "
        "--depth 2 --heads 2 --eval-interval 50 --checkpoint-interval 7 --eval-tokens 1000 "
        f"--precision float32 --device cpu --data {text}"
    ).split()

    def start(*arguments):
        return subprocess.Popen(
            [*command, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )

    process = start(*options, "--run", "runs/uninterrupted")
    process.communicate()
    assert process.returncode == 0
    killed, arguments = tmp_path / "runs" / "killed", [*options, "--run", "killed"]
    for kill_step in sorted(rng.sample(range(10, 190), 5)):
        process = start(*arguments)
        while process.poll() is None:
            # A line of the log every ten steps is the clock: it may be in the midst of a checkpoint.
            log = killed / "metrics.jsonl"
            if log.exists() and log.read_text().count('"lr_fraction"') * 10 >= kill_step:
                process.kill()
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        arguments = ["--resume", "killed"]
    process = start(*arguments)
    process.communicate()
    assert process.returncode == 0
    uninterrupted = tmp_path / "runs" / "uninterrupted"
    assert read_log(killed) == read_log(uninterrupted)
    for file in ("model.safetensors", "checkpoints/step-200/model.safetensors"):
        assert sha256(killed / file) == sha256(uninterrupted / file)

"""A run that was stopped, however, goes on as if nothing had been."""

import dataclasses
import hashlib
import inspect
import json
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

from gpt.checkpoint import load_tensors, model_class
from tokenizer import byte_tokenizer, train_words
from training.config import TrainingConfig
from training.data.corpus import CorpusWriter, TextChunk, open_corpus
from training.optimizer import Muon, Optimizers, lr_schedule, orthogonal, parameter_groups
from training.presets import PRESETS
from training.tasks import TASKS
from training.tasks.base import Prefetcher
from training.tasks.tables import TABLES
from training.tasks.text import Text, Vectors
from training.trainer import (
    Diverged,
    Stopped,
    Trainer,
    checkpoints,
    load_training_config,
    newest_checkpoint,
    save_training_config,
)

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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "saw",
        "a",
        "dog",
        "that",
        "sat",
        "too",
    ]
    chance = random.Random(0)
    writer = CorpusWriter(folder := tmp_path_factory.mktemp("corpus"), byte_tokenizer())
    for name, count in (("train", 200), ("validation", 20)):
        texts = [" ".join(chance.choices(words, k=12)) + "\n" for _ in range(count)]
        writer.write(name, [TextChunk(text, True) for text in texts])
    writer.close("cats and dogs")
    return open_corpus(folder)


def trainer_of(run, directory, corpus):
    directory.mkdir(exist_ok=True)
    return Trainer(run, directory, Text(run, corpus), torch.device("cpu"))


def log_of(directory):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "seconds" and not k.endswith("_per_second")}
        for line in lines
    ]


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_of(directory):
    newest = newest_checkpoint(directory)
    return {
        name: tensor
        for file in ("model", "optimizer", "random")
        for name, tensor in load_tensors(newest / f"{file}.safetensors").items()
    }


VARIANTS = {
    "muon": TINY,
    "adamw": dataclasses.replace(
        TINY, optimizer="adamw", learning_rate=1e-3, gradient_accumulation_steps=1
    ),
    "tied": dataclasses.replace(TINY, model_args=TINY.model_args | {"tied": True}),
    "bfloat16": dataclasses.replace(TINY, precision="bfloat16"),
    "sgd-carry": dataclasses.replace(
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


def assert_resumed_equals_undisturbed(run, task, stop, folder):
    """A signal in step `stop` of another run, from which a third goes on."""

    def trainer(name):
        directory = folder / name
        directory.mkdir(exist_ok=True)
        return Trainer(run, directory, task, torch.device("cpu"))

    straight = trainer("straight")
    straight.train()

    first = trainer("broken")
    take_step = first.train_step

    def step_then_signal(objective):
        if first.step == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(objective)

    first.train_step = step_then_signal
    with pytest.raises(Stopped) as stopped:
        first.train()
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert newest_checkpoint(folder / "broken").name == f"step-{stop}"

    torch.manual_seed(999)  # what happens in between must not matter
    second = trainer("broken")
    second.resume(newest_checkpoint(folder / "broken"))
    second.train()
    assert log_of(folder / "broken") == log_of(folder / "straight")
    one, other = tensors_of(folder / "broken"), tensors_of(folder / "straight")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    best = "model.safetensors"
    assert hash_of(folder / "broken" / best) == hash_of(folder / "straight" / best)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [1, 3, 5, 8, 11])
def test_resumed_equals_undisturbed_to_the_last_digit(variant, stop, corpus, tmp_path):
    run = VARIANTS[variant]
    assert_resumed_equals_undisturbed(run, Text(run, corpus), stop, tmp_path)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of itself
def test_resumed_equals_undisturbed_where_it_is_compiled(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    arguments = TINY.model_args | {"depth": 1}
    run = dataclasses.replace(TINY, model_args=arguments, compile=True, precision="bfloat16")
    assert_resumed_equals_undisturbed(run, Text(run, corpus), 5, tmp_path)


TINIEST = {"width": 8, "depth": 1, "heads": 2, "hidden": 8}


def tiny(run):
    """A preset in small: its model, task, optimizers and schedule, and what it carries."""
    known = inspect.signature(model_class(run.model)).parameters
    small = {} if run.task in TABLES else {k: v for k, v in TINIEST.items() if k in known}
    return dataclasses.replace(
        run,
        model_args=run.arguments | small,
        steps=4,
        batch_size=4,
        context_length=8,
        gradient_accumulation_steps=1 if run.carry else 2,
        warmup_steps=min(run.warm_up, 2),
        eval_interval=2,
        eval_tokens=16,
        checkpoint_interval=4,
        log_interval=1,
        sample_tokens=2,
        compile=False,
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sentences and what they are called elsewhere."""
    few = [("dog", "ami"), ("cat", "lui"), ("is", "est")]
    writer = CorpusWriter(folder := tmp_path_factory.mktemp("pairs"), byte_tokenizer())
    for name in ("train", "validation"):
        writer.write(name, [TextChunk(source, True, target) for source, target in few * 6])
    writer.close("dogs and cats", ("en", "fr"))
    return open_corpus(folder, pairs=True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resumes_exactly(name, corpus, pairs, tmp_path):
    run = tiny(PRESETS[name])
    if run.task in TABLES:
        task = TABLES[run.task].open(run, None, True)
    else:
        task = TASKS[run.task](run, pairs if run.task == "translation" else corpus)
    assert_resumed_equals_undisturbed(run, task, 3, tmp_path)


def read_ahead(trainer):
    """As where the device is a card."""
    trainer.feed = Prefetcher(trainer.task, trainer.run.steps, enabled=True)
    return trainer


def threads_of_feeds():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("variant", ["muon", "sgd-carry"])
def test_batches_made_ahead_are_the_same(variant, corpus, tmp_path):
    trainer_of(VARIANTS[variant], tmp_path / "one", corpus).train()
    made = []
    ahead = read_ahead(trainer_of(VARIANTS[variant], tmp_path / "ahead", corpus))
    take_step, make = ahead.train_step, ahead.task.batch

    def noted(index):
        made.append((index, threading.current_thread()))
        return make(index)

    def step(objective):
        loss = take_step(objective)
        # The next one is under way before this step has left the device.
        assert ahead.step + 1 in ahead.prefetcher.coming or ahead.step + 1 == ahead.config.steps
        return loss

    ahead.task.batch, ahead.train_step = noted, step
    ahead.train()
    assert log_of(tmp_path / "ahead") == log_of(tmp_path / "one")
    assert [index for index, _ in made] == list(range(ahead.config.steps))
    assert threading.current_thread() not in [thread for _, thread in made]
    assert not threads_of_feeds()

    # A step that is not the next one: a run that goes on.
    again = read_ahead(trainer_of(VARIANTS[variant], tmp_path / "ahead", corpus))
    again.resume(tmp_path / "ahead" / "checkpoints" / "step-9")
    again.train()
    assert log_of(tmp_path / "ahead") == log_of(tmp_path / "one")


def test_a_batch_that_cannot_be_made_ends_the_run_at_its_step(corpus, tmp_path):
    trainer = read_ahead(trainer_of(TINY, tmp_path / "run", corpus))
    make = trainer.task.batch

    def vanished(index):
        if index == 5:
            raise FileNotFoundError(2, "No such file or directory", "train.bin")
        return make(index)

    trainer.task.batch = vanished
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        trainer.train()
    assert trainer.step == 5
    assert not threads_of_feeds()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits_for_the_card(variant, corpus, tmp_path):
    run = VARIANTS[variant]
    trainer = Trainer(run, tmp_path, Text(run, corpus), torch.device("cuda"))
    try:
        for step in range(run.steps):
            trainer.train_step(trainer.objective)
            trainer.step += 1
            if step == 3:  # the first steps may: they make what later ones use
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_accumulation_is_the_same_step(corpus, tmp_path):
    whole = dataclasses.replace(
        TINY,
        gradient_accumulation_steps=1,
        model_args=TINY.model_args | {"dropout": 0.0},
        precision="float32",
    )
    logs = []
    for parts in (1, 2, 4):
        run = dataclasses.replace(whole, gradient_accumulation_steps=parts, steps=4)
        trainer_of(run, tmp_path / str(parts), corpus).train()
        logs.append([line["loss"] for line in log_of(tmp_path / str(parts)) if "loss" in line])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert logs[0] == pytest.approx(logs[2], rel=1e-4)


def test_it_learns_and_keeps_the_best_weights(corpus, tmp_path):
    run = dataclasses.replace(TINY, steps=120, eval_interval=20, eval_tokens=10_000)
    trainer = trainer_of(run, tmp_path / "run", corpus)
    trainer.train()
    log = log_of(tmp_path / "run")
    losses = [line["validation_loss"] for line in log if "sample" in line]
    assert log[0]["loss"] > 4
    assert losses[-1] < 1.6
    assert trainer.best == min(losses)


def test_only_whole_checkpoints_count_and_only_two_are_kept(corpus, tmp_path):
    trainer = trainer_of(TINY, tmp_path / "run", corpus)
    trainer.train()
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert names == ["step-9", "step-12"]
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-15.part").mkdir()
    (folder / "step-6.old").mkdir()
    assert newest_checkpoint(tmp_path / "run").name == "step-12"
    trainer.step = 13
    trainer.save()
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-13"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(corpus, tmp_path, monkeypatch):
    trainer = trainer_of(TINY, tmp_path / "run", corpus)
    trainer.train()
    before = {path.name: hash_of(path) for path in newest_checkpoint(tmp_path / "run").iterdir()}
    trainer.step = 99
    code = (
        "import resource, signal, sys; from pathlib import Path; import torch;"
        "from gpt.checkpoint import save_tensors;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "save_tensors(Path(sys.argv[1]), {'a': torch.zeros(10_000)})"
    )
    newest = newest_checkpoint(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", code, newest / "model.safetensors"], capture_output=True, text=True
    )
    assert "OSError" in done.stderr
    assert "model.safetensors" in done.stderr.splitlines()[-1]

    def full(*_):
        raise OSError(28, "No space left on device", "optimizer.safetensors")

    monkeypatch.setattr(trainer.optimizers, "state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    found = {path.name: hash_of(path) for path in newest.iterdir() if path.suffix != ".part"}
    assert found == before
    assert newest_checkpoint(tmp_path / "run") == newest


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(corpus, tmp_path):
    trainer = trainer_of(TINY, tmp_path / "run", corpus)
    take_step = trainer.train_step

    def spoiled(objective):
        loss = take_step(objective)
        return loss * math.nan if trainer.step == 7 else loss

    trainer.train_step = spoiled
    with pytest.raises(Diverged, match=r"loss of step 8 is not finite.*step-6.*--learning-rate"):
        trainer.train()
    assert newest_checkpoint(tmp_path / "run").name == "step-6"


def test_another_corpus_is_not_continued_on(corpus, tmp_path):
    trainer = trainer_of(TINY, tmp_path / "run", corpus)
    trainer.train()
    other = dataclasses.replace(corpus, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="another corpus"):
        trainer_of(TINY, tmp_path / "run", other).resume(newest_checkpoint(tmp_path / "run"))


def test_tensorboard_gets_what_the_log_gets(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_of(dataclasses.replace(TINY, tensorboard=True), tmp_path / "run", corpus).train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged)


def test_run_json_holds_the_whole_configuration(tmp_path):
    for run in (TINY, *PRESETS.values()):
        save_training_config(run, tmp_path, {"parameters": 1})
        as_json = json.loads(json.dumps(dataclasses.asdict(run)))  # whose tuples are lists
        assert dataclasses.asdict(load_training_config(tmp_path)) == as_json


def test_the_schedule_rises_stays_and_falls():
    run = dataclasses.replace(
        TINY, steps=100, warmup_steps=10, cooldown_fraction=0.5, final_lr_fraction=0.1
    )
    shares = [lr_schedule(run, index) for index in range(100)]
    assert shares[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert shares[9:51] == pytest.approx([1.0] * 42)
    assert shares[75] == pytest.approx(0.1 + 0.9 * 0.5)
    assert shares[99] == pytest.approx(0.1 + 0.9 * 0.02)
    assert all(
        lr_schedule(dataclasses.replace(run, warmup_steps=0, cooldown_fraction=0.0), index) == 1
        for index in (0, 99)
    )


@pytest.mark.parametrize(("warm_up", "cool_down"), [(10, 0.9), (0, 1.0), (5, 0.5)])
def test_the_cosine_is_torchs(warm_up, cool_down):
    run = TrainingConfig(
        steps=100,
        warmup_steps=warm_up,
        cooldown_fraction=cool_down,
        cosine_decay=True,
        final_lr_fraction=0.1,
    )
    falling = round(100 * cool_down)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, falling, eta_min=0.1)
    for index in range(100):
        rising = min(1.0, (index + 1) / max(1, warm_up))
        assert lr_schedule(run, index) == pytest.approx(min(rising, theirs.get_last_lr()[0]))
        if index >= 100 - falling:
            optimizer.step()
            theirs.step()
    with pytest.raises(ValueError, match="two ways to cool down"):
        dataclasses.replace(run, final_lr_fraction=0.0, step_decays=3)


def test_the_rate_of_the_cosine_is_nanogpts():
    run = PRESETS["nanogpt-cpu"]
    for index in range(100, run.steps):
        share = (index - 100) / (run.steps - 100)
        expected = 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * (1e-3 - 1e-4)
        assert run.learning_rate * lr_schedule(run, index) == pytest.approx(expected)


def test_decay_reaches_what_it_is_asked_for_and_no_vector(corpus, tmp_path):
    run = dataclasses.replace(TINY, optimizer="adamw", weight_decay=0.1, embedding_weight_decay=0.2)
    trainer = trainer_of(run, tmp_path / "run", corpus)
    decay_of = {
        id(parameter): group["weight_decay"]
        for optimizer in trainer.optimizers.all
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for kind, decay in {
        "matrices": 0.1,
        "embeddings": 0.2,
        "unembedding": 0.2,
        "vectors": 0.0,
    }.items():
        assert {decay_of[id(parameter)] for parameter in parameter_groups(trainer.model)[kind]} == {
            decay
        }


def test_every_parameter_is_moved_by_one_optimizer(corpus, tmp_path):
    trainer = trainer_of(TINY, tmp_path / "run", corpus)
    kinds = parameter_groups(trainer.model)
    assert sum(map(len, kinds.values())) == len(list(trainer.model.parameters()))
    assert kinds["embeddings"][0] is trainer.model.embedding.weight
    assert kinds["unembedding"][0] is trainer.model.unembedding.weight
    assert all(parameter.ndim == 2 for parameter in kinds["matrices"])
    moved = [
        parameter
        for optimizer in Optimizers(trainer.model, TINY, torch.device("cpu")).all
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(moved) == len({id(parameter) for parameter in moved})
    assert len(moved) == len(list(trainer.model.parameters()))


@pytest.mark.long
def test_killed_five_times_at_random_moments_equals_undisturbed(tmp_path, request):
    """The command itself, with SIGKILL: the same losses to the last digit, the same weights."""
    text = tmp_path / "text.txt"
    chance = random.Random(1)
    text.write_text(
        "".join(f"{chance.choice('abc')} says {chance.random():.3f}\n" for _ in range(4000))
    )
    environment = os.environ | {
        "PYTHONPATH": str(request.config.rootpath),
        "TINYGPT_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, "-m", "training", "train"]
    options = (
        "gpt-nano --tokenizer bytes --steps 200 --batch-size 4 --context-length 64 --width 32 --depth 2 --heads 2 "
        "--eval-interval 50 --checkpoint-interval 7 --eval-tokens 1000 --device cpu "
        f"--data {text}"
    ).split()

    def start(*arguments):
        return subprocess.Popen(
            [*command, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )

    straight = start(*options, "--run", "straight")
    straight.communicate()
    assert straight.returncode == 0
    broken, arguments = tmp_path / "broken", [*options, "--run", "broken"]
    kills = sorted(chance.sample(range(10, 190), 5))
    for kill in kills:
        process = start(*arguments)
        while process.poll() is None:
            # A line of the log is the clock: it comes every ten steps, mid-checkpoint or not.
            log = broken / "metrics.jsonl"
            if log.exists() and log.read_text().count('"rate_share"') * 10 >= kill:
                process.kill()
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        arguments = ["--resume", "broken"]
    last = start(*arguments)
    last.communicate()
    assert last.returncode == 0
    assert log_of(broken) == log_of(tmp_path / "straight")
    assert hash_of(broken / "model.safetensors") == hash_of(tmp_path / "straight/model.safetensors")
    file = "checkpoints/step-200/model.safetensors"
    assert hash_of(broken / file) == hash_of(tmp_path / "straight" / file)


def test_the_rate_halves_as_zaremba_had_it():
    epochs = 13
    run = TrainingConfig(steps=epochs * 10, warmup_steps=0, cooldown_fraction=9 / 13, step_decays=9)
    shares = [
        {lr_schedule(run, epoch * 10 + step) for step in range(10)} for epoch in range(epochs)
    ]
    assert shares == [{1.0}] * 4 + [{0.5**n} for n in range(1, 10)]


def test_a_carried_state_is_what_one_long_row_would_have_had(corpus, tmp_path):
    run = dataclasses.replace(VARIANTS["sgd-carry"], precision="float32")
    trainer = trainer_of(dataclasses.replace(run, learning_rate=1e-12, steps=3), tmp_path, corpus)
    trainer.optimizers.step = lambda index: trainer.model.zero_grad()  # the weights stay
    trainer.train()
    rows = [trainer.task.batch(step)[0] for step in range(3)]
    state = trainer.model.init_state(run.batch_size, 48)
    trainer.model.features(torch.from_numpy(np.concatenate(rows, axis=1)), state)
    for name, tensor in state.items():
        torch.testing.assert_close(trainer.state[name], tensor)


def test_a_new_epoch_begins_with_an_empty_state(corpus, tmp_path):
    task = Text(VARIANTS["sgd-carry"], corpus)
    starts = [step for step in range(2 * task.order.epoch + 1) if not task.continues_previous(step)]
    assert starts == [0, task.order.epoch, 2 * task.order.epoch]
    assert (task.batch(0)[0] == task.batch(task.order.epoch)[0]).all()


def test_vectors_of_another_run_begin_the_embedding(corpus, tmp_path):
    run = dataclasses.replace(
        TINY,
        model="word2vec",
        task="word-vectors",
        model_args={"width": 16},
        steps=4,
        gradient_accumulation_steps=1,
    )
    (tmp_path / "words").mkdir()
    first = Trainer(run, tmp_path / "words", Vectors(run, corpus), torch.device("cpu"))
    first.train()
    corpus.tokenizer.save(tmp_path / "words" / "tokenizer.json")
    tensors = load_tensors(tmp_path / "words" / "model.safetensors")

    later = dataclasses.replace(TINY, init_embedding=str(tmp_path / "words"))
    second = trainer_of(later, tmp_path / "gpt", corpus)
    second.load_init_embedding()
    assert torch.equal(second.model.embedding.weight, tensors["embedding.weight"])

    wide = dataclasses.replace(later, model_args={"width": 32, "depth": 1, "heads": 1})
    with pytest.raises(ValueError, match=r"the shape \[257, 16\], this model's \[257, 32\]"):
        trainer_of(wide, tmp_path / "wide", corpus).load_init_embedding()
    train_words(["other words"], 9).save(tmp_path / "words" / "tokenizer.json")
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer_of(later, tmp_path / "other", corpus).load_init_embedding()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_makes_every_singular_value_about_one(dtype):
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 8, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape), dtype).float())
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_muon_is_torchs():
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 16), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.1, "weight_decay": 0.1}
    one = Muon([{"params": ours, **settings}])
    other = torch.optim.Muon(theirs, momentum=0.95, **settings)
    for _ in range(4):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, its, shape in zip(ours, theirs, shapes, strict=True):
        # torch's is computed in bfloat16: four moves of 0.1, each with an error of a percent.
        torch.testing.assert_close(mine, its, atol=0.004, rtol=0.01, msg=str(shape))

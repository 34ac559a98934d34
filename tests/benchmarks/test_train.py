"""benchmarks.train with tiny models; its GPU part on the CPU."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models, train, training_configs
from benchmarks.report import format_median
from benchmarks.train import TrainingSession, compare, measure_throughput, segment_steps, summarize
from benchmarks.training_configs import Comparison
from gpt.checkpoint import build_model
from gpt.summary import count_parameters
from tokenizer import train_characters, train_words
from training.data.corpus import CorpusWriter, TextChunk
from training.presets import PRESETS
from training.tasks import open_task
from training.trainer import Objective, Trainer

TEXT = "Once upon a time, there was a cat.\nIt sat on a mat; the mat was red.\n"
TINY = {"width": 16, "depth": 2, "heads": 2}
PRESET_NAMES = ("nanogpt-cpu", "nanogpt-gpu", "gpt2-124m", "shakespeare", "shakespeare-gpu")


def prepare(folder, tokenizer):
    folder.mkdir()
    writer = CorpusWriter(folder, tokenizer)
    writer.write("train", [TextChunk(TEXT * 20, True)])
    writer.write("validation", [TextChunk(TEXT, True)])
    writer.close("a cat")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data") / "cat", train_characters([TEXT], 100))


def tiny(config, data, **settings):
    small = {
        "batch_size": 4,
        "context_length": 16,
        "gradient_accumulation_steps": 1,
        "compile": "off",
        "device": "cpu",
    }
    model_args = config.model_args | TINY
    return dataclasses.replace(config, data=data, model_args=model_args, **small | settings)


class LocalWorker:
    """A training worker in this process."""

    def __init__(self, name, target, config, threads):
        self.session = TrainingSession(config)

    def receive(self):
        return self.session.info()

    def request(self, steps):
        return self.session.train(steps)

    def close(self):
        pass


@pytest.fixture
def local(monkeypatch):
    monkeypatch.setattr(train, "Worker", LocalWorker)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_presets_train(name, data, tmp_path):
    config = tiny(PRESETS[name], data, batch_size=2)
    trainer = Trainer(config, tmp_path, open_task(config), torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    for _ in range(3):  # zero-initialized matrices pass gradients on once they have moved
        assert trainer.train_step(Objective(trainer.model)).isfinite()
        trainer.step += 1
    after = trainer.model.parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("name", "vocab_size", "published"),
    [("nanogpt-cpu", 65, 0.80e6), ("nanogpt-gpu", 65, 10.65e6), ("gpt2-124m", 50_257, 123.65e6)],
)
def test_baselines_have_the_published_number_of_parameters(name, vocab_size, published):
    """nanoGPT's count leaves out the position embedding."""
    config = PRESETS[name]
    sizes = {"vocab_size": vocab_size, "context_length": config.context_length}
    with torch.device("meta"):
        model = build_model(config.model, {**sizes, **config.model_args})
    positions = model.get_parameter("position.weight").numel()
    assert count_parameters(model) - positions == pytest.approx(published, abs=0.005e6)


def test_transformers_model_has_the_same_loss():
    torch.manual_seed(0)
    model = models.TransformersGPT2(50, 16, **TINY)
    tokens_BT = torch.randint(50, (3, 16))
    expected = model.model(tokens_BT, labels=tokens_BT).loss
    loss = model.loss(tokens_BT, tokens_BT.roll(-1, 1).index_fill(1, torch.tensor([15]), -100))
    torch.testing.assert_close(loss, expected)


def test_segments_have_equal_numbers_of_steps():
    assert segment_steps(2000, 50) == [40] * 50
    assert sum(segment_steps(1001, 50)) == 1001
    assert sorted(segment_steps(7, 50))[-8:] == [0] + [1] * 7


def test_cpu_comparison(local, data):
    comparison = training_configs.cpu_comparison()
    configs = {
        name: tiny(config, data, steps=60, warmup_steps=5)
        for name, config in comparison.configs.items()
    }
    result = compare(dataclasses.replace(comparison, configs=configs, target_loss=3.0), 2, 1)
    assert len(result["rounds"]) == 2
    for results in result["rounds"]:
        assert list(results) == ["shakespeare", "nanogpt-cpu", "transformers"]
        for config_result in results.values():
            curve = config_result["curve"]
            steps, clock = ([point[key] for point in curve] for key in ("step", "seconds"))
            assert (len(steps), steps[-1]) == (50, 60)
            assert steps == sorted(steps)
            assert clock == sorted(clock)
            assert config_result["final_loss"] < curve[0]["loss"]
        assert results["shakespeare"]["seconds_to_target"]
    losses = [[p["loss"] for p in round_["shakespeare"]["curve"]] for round_ in result["rounds"]]
    assert losses[0] != losses[1]
    assert "| transformers |" in train.comparison_table(result)


def test_ablations(local, data):
    """Every ablation trains, for as many tokens as the full config."""
    comparison = training_configs.ablation_study()
    configs = comparison.configs.values()
    tokens = {config.steps * config.batch_size * config.context_length for config in configs}
    assert max(tokens) - min(tokens) < 24 * 128
    assert len({repr(dataclasses.replace(config, steps=1)) for config in configs}) == len(configs)
    small = {name: tiny(config, data, steps=4) for name, config in comparison.configs.items()}
    result = compare(dataclasses.replace(comparison, configs=small, segments=2), 1, 1)
    table = train.comparison_table(result)
    assert "| no n-grams |" in table
    assert "after each 50% of the steps" in table
    assert "seconds to" not in table
    full, tied = (result["rounds"][0][name] for name in ("shakespeare", "tied unembedding"))
    assert f"| {tied['final_loss'] - full['final_loss']:+.4f} |" in table


def test_averaged_config_scores_the_average_of_the_weights(data):
    base = tiny(PRESETS["shakespeare"], data)
    averaged = [
        training_configs.AveragedConfig(**dataclasses.asdict(base), ema_decay=decay)
        for decay in (0.0, 0.9)
    ]
    plain, without_decay, with_decay = (
        TrainingSession(config).train(6)["loss"] for config in (base, *averaged)
    )
    assert plain == without_decay < with_decay


def test_gpu_comparison(local, data):
    comparison = training_configs.gpu_comparison()
    assert {config.device for config in comparison.configs.values()} == {"cuda"}
    configs = {name: tiny(config, data, steps=4) for name, config in comparison.configs.items()}
    result = compare(dataclasses.replace(comparison, configs=configs), 1, 1)
    table = train.comparison_table(result)
    assert "seconds to 1.47" in table
    assert "Where nanogpt-gpu did not reach 1.47" in table


def test_throughput(local):
    configs = training_configs.throughput_configs()
    shapes = {
        (config.vocab_size, config.batch_size * config.context_length)
        for config in configs.values()
    }
    assert shapes == {(50_304, 491_520)}
    assert {config.precision for config in configs.values()} == {"bfloat16"}
    small = {name: tiny(config, "stdlib", vocab_size=100) for name, config in configs.items()}
    result = measure_throughput(small, 1, steps=1)
    for config_result in result["results"].values():
        assert config_result["tokens_per_second"] > 0
        assert config_result["mfu"] is None
    table = train.throughput_table(result)
    assert "unknown" in table
    assert "| gpt2-124m |" in table


def curve(*points):
    return {
        "curve": [
            {"step": step, "seconds": seconds, "loss": loss, "peak_bytes": step * 2**20}
            for step, (seconds, loss) in enumerate(points, 1)
        ]
    }


def test_target_is_reached_at_the_first_score_at_or_below_it():
    config = dataclasses.replace(PRESETS["nanogpt-cpu"], batch_size=10, context_length=10)
    configs = {"fast": config, "baseline": config, "slow": config}
    comparison = Comparison("a comparison", configs, "baseline", 2.0)
    results = {
        "fast": curve((1.0, 3.0), (2.0, 1.9), (3.0, 2.1), (9.0, 1.5)),
        "baseline": curve((2.0, 4.0), (4.0, 2.1), (6.0, 2.0), (8.0, 1.95)),
        "slow": curve((3.0, 4.0), (9.0, 3.0)),
    }
    summary = summarize(comparison, [results])
    assert [result["seconds_to_target"] for result in results.values()] == [2.0, 6.0, None]
    assert [result["speedup"] for result in results.values()] == [3.0, 1.0, None]
    # The best loss of `fast` comes after the baseline's total time.
    assert [result["best_loss_in_time"] for result in results.values()] == [1.9, 1.95, 4.0]
    assert [result["best_loss"] for result in results.values()] == [1.5, 1.95, 3.0]
    assert results["fast"]["tokens_per_second"] == 3 * 100 / 8.0
    assert results["fast"]["peak_bytes"] == 2**20
    for result in results.values():
        result["info"] = {"device": "cpu", "compile": {"enabled": False}, "compile_seconds": 0.0}
    table = train.comparison_table(summary).splitlines()
    assert table[4] == "| fast | 2.0 | 3.00 | 3.0000 | 1.9000 | 1.5000 | 1.5000 | 38 | 1 MiB |"
    assert table[6] == "| slow | – | – | 4.0000 | 4.0000 | 3.0000 | 3.0000 | 17 | 1 MiB |"


def test_format_median():
    assert format_median([3.0, 1.0, 2.0], "{:.1f}".format) == "2.0 (1.0 to 3.0)"
    assert format_median([3.0, None, 1.0], "{:.0f}".format) == "2 (1 to 3), 2 of 3"
    assert format_median([None, None], "{:.0f}".format) == "–"
    assert format_median([1.0], "{:.0f}".format) == "1"


def test_command_trains_in_processes_and_writes_both_files(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "bench" / "train.json"
    names = ["nanogpt-cpu", "shakespeare"]
    train.main(
        f"--data {data} --output {output} --seeds 1 --threads 1 --steps 3 --only".split() + names
    )
    printed = capfd.readouterr().out
    result = json.loads(output.read_text())
    assert result["data"]["validation"] == len(TEXT)
    assert result["machine"]["torch"] == torch.__version__
    assert "throughput" not in result
    (comparison,) = result["comparisons"]
    assert comparison["configs"].keys() == set(names)
    for name, config_result in comparison["rounds"][0].items():
        assert [point["step"] for point in config_result["curve"]] == [1, 2, 3]
        assert config_result["peak_bytes"] > 2**20 or sys.platform != "linux"
        assert config_result["info"]["parameters"] > 700_000
        assert f"| {name} |" in printed
    assert "No GPU" in printed
    assert output.with_suffix(".md").read_text() in printed


def test_dead_worker_is_one_line(data, capfd):
    config = dataclasses.replace(PRESETS["nanogpt-cpu"], data=data, context_length=10_000)
    worker = train.Worker("baseline", train.training_worker, config, 1)
    with pytest.raises(ValueError, match="baseline: the worker process died; its error is above"):
        worker.receive()
    worker.process.join()
    assert "one window of 10,000 needs" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --data"),
        (["--data", "absent.txt"], "absent.txt: no such file"),
        (["--data", "DATA", "--only", "nanogtp"], "--only nanogtp: unknown name; expected one of"),
        (["--data", "DATA", "--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--data", "DATA", "--steps", "1"], "--steps must be at least 2, not 1"),
        (["--data", "WORDS"], "prepare it with --tokenizer characters"),
    ],
)
def test_errors_are_one_line(arguments, message, data, tmp_path, capsys):
    if "WORDS" in arguments:
        arguments = ["--data", prepare(tmp_path / "words", train_words([TEXT], 100))]
    with pytest.raises(SystemExit) as exit_:
        train.main([data if argument == "DATA" else argument for argument in arguments])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in err
    assert err.count("\n") == 1


def test_needs_no_data_or_web_library(data):
    code = (
        "import dataclasses, sys; from benchmarks.train import TrainingSession, get_preset;"
        f"TrainingSession(dataclasses.replace(get_preset('nanogpt-cpu'), data={data!r}));"
        "print({'datasets', 'fastapi', 'uvicorn', 'pyarrow', 'transformers'} & sys.modules.keys())"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.strip() == "set()"


def test_tinyshakespeare_is_split_as_in_nanogpt(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    file = real_data / "tinyshakespeare" / "input.txt"
    text = file.read_text("utf-8")
    corpus = train.open_character_corpus(str(file))
    splits = {name: split.tokens.tolist() for name, split in corpus.splits.items()}
    split_index = int(0.9 * len(text))
    assert corpus.tokenizer.decode(splits["train"]) == text[:split_index]
    assert corpus.tokenizer.decode(splits["validation"]) == text[split_index:]
    # Every character of the validation split is scored.
    assert len(splits["validation"]) - 1 == 111_540


def test_documented_commands_parse(monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text("utf-8")
    commands = re.findall(r"^.*-m benchmarks\.train (.*)$", text, re.MULTILINE)
    assert commands
    parsed = []
    monkeypatch.setattr(train, "benchmark", lambda **options: parsed.append(options))
    for command in commands:
        train.main(shlex.split(command))
    assert parsed[0]["ablate"]

"""The chapters' own tables of numbers, and how well the presets fit them."""

import dataclasses

import numpy as np
import pytest
import torch

from gpt.checkpoint import build_model
from training.config import TrainingConfig
from training.presets import PRESETS, TABLE_PRESETS
from training.tasks import check_task, open_task
from training.tasks.tables import (
    BROWN,
    CURVES,
    FRANKEN,
    TABULAR_TASKS,
    WHITE,
    TabularTask,
    grain_rows,
)
from training.trainer import Trainer


def open_table(name, **options):
    return open_task(TrainingConfig(task=name, model=model_of(name), **options))


def model_of(name):
    """A model that can learn the table."""
    return {
        "regression": "linear",
        "binary-classification": "logistic",
        "classification": "softmax-table",
    }[TABULAR_TASKS[name].kind]


def train(name, folder, **options):
    """Train a preset; return the model, its task and its score."""
    config = dataclasses.replace(PRESETS[name], device="cpu", **options)
    trainer = Trainer(config, folder, open_task(config), torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train()
    return trainer.model, trainer.task, trainer.task.score(trainer.model, "validation")


def test_grains_need_the_cups_of_water_of_the_chapter():
    x_BD, y_B = grain_rows(torch.tensor([1.0, 5.0]), WHITE, BROWN, FRANKEN)
    assert x_BD.tolist() == [[1, 0], [5, 0], [1, 0.5], [5, 0.5], [1, 1], [5, 1]]
    assert y_B.tolist() == [2, 10, 3, 15, 1, 5]
    for name, num_grains in (("rice", 2), ("grains", 3)):
        splits = open_table(name).table.splits
        assert len(splits["train"][1]) == 9 * num_grains
        assert splits["beyond"][1].tolist() == [20, 30, 10][:num_grains]


def test_shot_of_ten_meters_needs_fifty():
    shots = open_table("basketball").table.splits
    assert [tensor.tolist() for tensor in shots["beyond"]] == [[[10]], [50]]
    assert 10 not in shots["train"][0]


def test_five_lines_are_straight_within_and_beyond_the_training_range():
    splits = open_table("lines").table.splits
    x_BD, y_B = (torch.cat(tensors).double() for tensors in zip(*splits.values(), strict=True))
    assert x_BD[:, 1].unique().tolist() == [-1, -0.5, 0, 0.5, 1]
    for z in x_BD[:, 1].unique():
        rows = x_BD[:, 1] == z
        slope, intercept = np.polyfit(x_BD[rows, 0], y_B[rows], 1)
        assert max(abs(slope), abs(intercept)) <= 2
        np.testing.assert_allclose(slope * x_BD[rows, 0] + intercept, y_B[rows], atol=1e-5)
    beyond_B = splits["beyond"][0][:, 0].abs()
    assert (beyond_B.min(), beyond_B.max()) == (1.5, 3)
    assert splits["train"][0][:, 0].abs().max() == 1


@pytest.mark.parametrize("name", CURVES)
def test_curves_have_sixty_training_points(name):
    truth = {"square": lambda x: x * x + 1, "cubic": np.poly1d([1, -2, 0, 1])}.get(
        name, lambda x: np.sin(2 * x)
    )
    splits = open_table(name).table.splits
    for x_BD, y_B in splits.values():
        np.testing.assert_allclose(y_B, truth(x_BD[:, 0].double().numpy()), atol=1e-5)
    assert len(splits["train"][1]) == 60
    assert (splits["train"][0].min(), splits["train"][0].max()) == (-1.5, 2.5)


@pytest.mark.parametrize("name", TABULAR_TASKS)
def test_training_rows_are_in_no_other_split(name):
    splits = open_table(name).table.splits
    train_rows = set(map(tuple, splits["train"][0].tolist()))
    if name != "which-grain":  # measurements are clamped to 0 and 1
        assert len(train_rows) == len(splits["train"][1])
        for split, (x_BD, _) in splits.items():
            assert split == "train" or train_rows.isdisjoint(map(tuple, x_BD.tolist()))


@pytest.mark.parametrize("name", ["lines", "white-or-brown", "which-grain"])
def test_random_tables_depend_on_the_seed(name):
    first, same, other = (open_table(name, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_batches_depend_on_seed_and_step_and_an_epoch_has_every_row():
    task = open_table("rice", batch_size=6)
    first = [task.batch(index) for index in range(3)]
    for batch, (x_BD, y_B) in zip(
        [open_table("rice", batch_size=6).batch(i) for i in range(3)], first, strict=True
    ):
        assert (batch[0] == x_BD).all()
        assert (batch[1] == y_B).all()
        assert x_BD.dtype == y_B.dtype == np.float32
    rows = {(*x, y) for x_BD, y_B in first for x, y in zip(x_BD.tolist(), y_B, strict=True)}
    assert len(rows) == 18
    assert not (task.batch(3)[0] == first[0][0]).all()
    assert not (open_table("rice", batch_size=6, seed=1).batch(0)[0] == first[0][0]).all()
    assert len(open_table("rice", batch_size=1000).batch(7)[1]) == 18


# Steps of each preset, and bounds (lower, upper) on the loss of each split after them.
BOUNDS = {
    "linear": (600, {"validation": (0, 1e-4), "beyond": (0, 1e-3)}),
    "rice-linear": (600, {"train": (0.41, 0.42), "beyond": (10, 20)}),
    "rice-sigma-pi": (600, {"train": (0, 1e-4), "beyond": (0, 1e-3), "franken": (8.9, 9.1)}),
    "grain-sigma-pi": (600, {"train": (5.3, 5.4)}),
    "logistic": (300, {"train": (0, 0.1)}),
    "grain-softmax": (300, {"train": (0, 0.25)}),
    "curve-mlp": (600, {"validation": (0, 2e-3), "beyond": (1, 100)}),
    "rice-mlp": (800, {"validation": (0, 1e-2), "beyond": (1, 100)}),
    "digits-softmax": (400, {"train": (0.1, 0.3), "validation": (0.2, 0.5)}),
    "digits-mlp": (400, {"train": (0, 0.1), "validation": (0.1, 0.4)}),
    "grain-mlp": (1500, {"validation": (0, 5e-2), "beyond": (5, 500)}),
    "grain-experts": (1000, {"validation": (0, 1e-4), "beyond": (0, 1e-3)}),
    "lines-mlp": (600, {"beyond": (0.5, 100)}),
    "lines-experts": (1500, {"validation": (0, 1e-2), "beyond": (0, 1)}),
}


def test_every_preset_of_a_table_has_bounds():
    assert BOUNDS.keys() == TABLE_PRESETS.keys()


def assert_within(score, bounds):
    assert all(
        lower <= score.figures[split]["loss"] <= upper for split, (lower, upper) in bounds.items()
    ), score.figures


@pytest.mark.parametrize("name", BOUNDS)
def test_preset_reaches_the_loss_of_the_chapters(name, tmp_path):
    steps, bounds = BOUNDS[name]
    _, _, score = train(name, tmp_path, steps=steps)
    assert_within(score, bounds)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["linear", "rice-sigma-pi", "rice-mlp", "grain-mlp", "grain-experts"]
)
@pytest.mark.parametrize("seed", range(1, 4))
def test_preset_reaches_the_loss_with_other_seeds(name, seed, tmp_path):
    _, bounds = BOUNDS[name]
    _, _, score = train(name, tmp_path, seed=seed)
    assert_within(score, bounds)


@pytest.mark.long
def test_chapter_6_experts_extrapolate_lines_and_a_network_does_not(tmp_path):
    losses = {
        name: np.median(
            [
                train(name, tmp_path / f"{name}-{seed}", seed=seed)[2].figures["beyond"]["loss"]
                for seed in range(5)
            ]
        )
        for name in ("lines-experts", "lines-mlp")
    }
    assert losses["lines-experts"] < losses["lines-mlp"] / 2


def test_learned_law_is_reported_in_words(tmp_path):
    model, task, score = train("rice-sigma-pi", tmp_path, steps=800)
    assert score.formulas == [
        "y = 2.00 x z + 2.00 x",
        "(x: cups, z: darkness, y: cups of water)",
    ]
    examples = task.sample(model, 40).splitlines()
    assert "10 cups of brown rice: 30 cups of water (30)" in examples
    assert "1 cup of franken-grain: 4 cups of water (1)" in examples
    assert task.sample(model, 0) == ""
    lines = task.score(model, "beyond").table().splitlines()
    assert "  beyond      10 cups of white rice: 20 cups of water (20)" in lines
    assert "              10 cups of brown rice: 30 cups of water (30)" in lines
    assert "  franken     1 cup of franken-grain: 4 cups of water (1)" in lines
    assert lines[-2] == "  y = 2.00 x z + 2.00 x"
    assert "franken: 1 row, a grain it has not seen" in task.sizes
    assert any(line.split() == ["franken", "loss", "9"] for line in lines)


def test_best_weights_are_saved_and_json_is_flat(tmp_path):
    _, task, score = train("linear", tmp_path, steps=50)
    assert (tmp_path / "model.safetensors").is_file()
    figures = score.to_json()
    assert figures["loss"] == figures["validation_loss"]
    assert figures.keys() == {"loss", *(f"{split}_loss" for split in task.splits)}
    assert all(isinstance(value, float) for value in figures.values())
    assert task.format_loss(0.25) == "validation: mean squared error 0.25"


def test_logistic_and_softmax_agree_on_two_classes(tmp_path):
    _, task, logistic = train("logistic", tmp_path / "one", steps=300)
    config = dataclasses.replace(PRESETS["logistic"], model="softmax-table", steps=300)
    softmax = Trainer(config, tmp_path / "two", open_task(config), torch.device("cpu"))
    assert softmax.model.scores.weight.shape == (2, 2)
    (tmp_path / "two").mkdir()
    softmax.train()
    score = task.score(softmax.model, "validation")
    for name, tolerance in (("loss", 0.02), ("accuracy", 0.01)):
        difference = logistic.figures["train"][name] - score.figures["train"][name]
        assert abs(difference) < tolerance
    assert logistic.figures["validation"]["accuracy"] > 0.95


def test_softmax_separates_grains_halfway_between_them(tmp_path):
    model, task, _ = train("grain-softmax", tmp_path)
    weights, biases = model.scores.weight[:, 0], model.scores.bias
    borders = -(biases.diff() / weights.diff())
    assert borders.tolist() == pytest.approx([0.25, 0.75], abs=0.04)
    assert task.sample(model, 1).splitlines()[0].endswith("(white rice)")
    assert "% sure" in task.sample(model, 1)


def test_accuracy_is_the_share_of_correct_rows():
    model = build_model("logistic", {"inputs": 2})
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([-2.5, 1.0]))
    task = open_table("white-or-brown")
    x_BD, class_B = task.table.splits["validation"]
    expected = (model.classify(x_BD) == class_B).double().mean().item()
    assert task.score(model, "validation").figures["validation"]["accuracy"] == pytest.approx(
        expected
    )


def test_validation_does_not_change_the_model():
    task, model = open_table("rice"), build_model("linear", {"inputs": 2})
    model.train()
    assert task.validate(model) == task.validate(model)
    assert model.training
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrainingConfig(model="linear", task="which-grain"),
            "linear cannot learn the task which-grain",
        ),
        (TrainingConfig(model="logistic", task="rice"), "its --task can be white-or-brown$"),
        (
            TrainingConfig(model="linear", task="rise"),
            r"no task is named 'rise' \(did you mean rice",
        ),
        (
            TrainingConfig(model="linear", task="rice", context_length=8),
            "--context-length has no meaning in the task rice",
        ),
        (TrainingConfig(model="linear", task="rice", data="a.txt"), "--data has no meaning"),
    ],
)
def test_unsuitable_models_and_options_are_rejected(config, message):
    with pytest.raises(ValueError, match=message):
        check_task(config)


def test_experts_with_inputs_that_the_table_lacks_are_rejected(tmp_path):
    config = dataclasses.replace(PRESETS["grain-experts"], task="square")
    with pytest.raises(ValueError, match=r"indices of the 1 inputs.*\[0\] and \[1\]"):
        Trainer(config, tmp_path, open_task(config), torch.device("cpu"))


def test_unsupported_options_are_fields_of_the_config():
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert fields >= TabularTask.unsupported_options


def test_only_small_models_are_written_out():
    task = open_table("rice")
    for hidden, lines in (((8,), 10), ((16,), 0)):  # 33 and 65 weights
        model = build_model("mlp-table", {"inputs": 2, "hidden": hidden})
        assert len(task.score(model, "validation").formulas) == lines


@pytest.mark.parametrize("name", TABULAR_TASKS)
def test_inputs_of_a_small_table_have_letters(name):
    table = open_table(name).table
    x_BD, _ = table.splits["train"]
    assert len(table.inputs) == (x_BD.shape[1] if x_BD.shape[1] <= 3 else 0)

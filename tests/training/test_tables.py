"""The documents' small data: what is in it, and what each rung makes of it under the one trainer."""

import dataclasses

import numpy as np
import pytest
import torch

from gpt.checkpoint import build_model
from training.config import TrainingConfig
from training.presets import PRESETS, TABLE_PRESETS
from training.tasks import check, open_task
from training.tasks.tables import BROWN, CURVES, FRANKEN, TABLES, WHITE, Numbers, grains
from training.trainer import Trainer


def opened(name, **own):
    return open_task(TrainingConfig(task=name, model=model_of(name), **own))


def model_of(name):
    """Any model that learns the table."""
    return {
        "regression": "linear",
        "binary-classification": "logistic",
        "classification": "softmax-table",
    }[TABLES[name].kind]


def trained(name, folder, **own):
    """The preset's model as the trainer leaves it, its task and its final report."""
    run = dataclasses.replace(PRESETS[name], device="cpu", **own)
    trainer = Trainer(run, folder, open_task(run), torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train()
    return trainer.model, trainer.task, trainer.task.score(trainer.model, "validation")


def test_grains_need_the_documents_cups_of_water():
    x_BD, y_B = grains(torch.tensor([1.0, 5.0]), WHITE, BROWN, FRANKEN)
    assert x_BD.tolist() == [[1, 0], [5, 0], [1, 0.5], [5, 0.5], [1, 1], [5, 1]]
    assert y_B.tolist() == [2, 10, 3, 15, 1, 5]
    for name, kinds in (("rice", 2), ("grains", 3)):
        splits = opened(name).table.splits
        assert len(splits["train"][1]) == 9 * kinds
        assert splits["beyond"][1].tolist() == [20, 30, 10][:kinds]


def test_a_shot_of_ten_metres_needs_fifty():
    shots = opened("basketball").table.splits
    assert [tensor.tolist() for tensor in shots["beyond"]] == [[[10]], [50]]
    assert 10 not in shots["train"][0]


def test_five_lines_are_lines_inside_and_far_outside():
    splits = opened("lines").table.splits
    x_BD, y_B = (torch.cat(tensors).double() for tensors in zip(*splits.values(), strict=True))
    assert x_BD[:, 1].unique().tolist() == [-1, -0.5, 0, 0.5, 1]
    for z in x_BD[:, 1].unique():
        own = x_BD[:, 1] == z
        slope, intercept = np.polyfit(x_BD[own, 0], y_B[own], 1)
        assert max(abs(slope), abs(intercept)) <= 2
        np.testing.assert_allclose(slope * x_BD[own, 0] + intercept, y_B[own], atol=1e-5)
    far_B = splits["beyond"][0][:, 0].abs()
    assert (far_B.min(), far_B.max()) == (1.5, 3)
    assert splits["train"][0][:, 0].abs().max() == 1


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_sixty_points_judged_between(name):
    truth = {"square": lambda x: x * x + 1, "cubic": np.poly1d([1, -2, 0, 1])}.get(
        name, lambda x: np.sin(2 * x)
    )
    splits = opened(name).table.splits
    for x_BD, y_B in splits.values():
        np.testing.assert_allclose(y_B, truth(x_BD[:, 0].double().numpy()), atol=1e-5)
    assert len(splits["train"][1]) == 60
    assert (splits["train"][0].min(), splits["train"][0].max()) == (-1.5, 2.5)


@pytest.mark.parametrize("name", TABLES)
def test_no_row_is_both_trained_on_and_judged(name):
    splits = opened(name).table.splits
    seen = set(map(tuple, splits["train"][0].tolist()))
    if name != "which-grain":  # a meter that reads 0 or 1 does so more than once
        assert len(seen) == len(splits["train"][1])
        for part, (x_BD, _) in splits.items():
            assert part == "train" or seen.isdisjoint(map(tuple, x_BD.tolist()))


@pytest.mark.parametrize("name", ["lines", "white-or-brown", "which-grain"])
def test_what_is_random_is_the_seeds(name):
    first, again, other = (opened(name, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_batch_is_a_function_of_seed_and_step_and_an_epoch_is_every_row():
    task = opened("rice", batch=6)
    first = [task.batch(index) for index in range(3)]
    for batch, (x_BD, y_B) in zip(
        [opened("rice", batch=6).batch(i) for i in range(3)], first, strict=True
    ):
        assert (batch[0] == x_BD).all()
        assert (batch[1] == y_B).all()
        assert x_BD.dtype == y_B.dtype == np.float32
    rows = {(*x, y) for x_BD, y_B in first for x, y in zip(x_BD.tolist(), y_B, strict=True)}
    assert len(rows) == 18
    assert not (task.batch(3)[0] == first[0][0]).all()
    assert not (opened("rice", batch=6, seed=1).batch(0)[0] == first[0][0]).all()
    assert len(opened("rice", batch=1000).batch(7)[1]) == 18


# What each preset reaches in how many steps: bounds on the loss of each part, (least, most).
REACHED = {
    "linear": (600, {"validation": (0, 1e-4), "beyond": (0, 1e-3)}),
    "rice-linear": (600, {"train": (0.41, 0.42), "beyond": (10, 20)}),
    "rice-sigma-pi": (600, {"train": (0, 1e-4), "beyond": (0, 1e-3), "franken": (8.9, 9.1)}),
    "grain-sigma-pi": (600, {"train": (5.3, 5.4)}),
    "logistic": (300, {"train": (0, 0.1)}),
    "grain-softmax": (300, {"train": (0, 0.25)}),
    "curve-mlp": (600, {"validation": (0, 2e-3), "beyond": (1, 100)}),
    "rice-mlp": (800, {"validation": (0, 1e-2), "beyond": (1, 100)}),
    "grain-mlp": (1500, {"validation": (0, 5e-2), "beyond": (5, 500)}),
    "grain-experts": (1000, {"validation": (0, 1e-4), "beyond": (0, 1e-3)}),
    "lines-mlp": (600, {"beyond": (0.5, 100)}),
    "lines-experts": (1500, {"validation": (0, 1e-2), "beyond": (0, 1)}),
}


def test_every_preset_of_a_table_is_held_to_a_figure():
    assert REACHED.keys() == TABLE_PRESETS.keys()


def within(report, bounds):
    assert all(
        least <= report.figures[part]["loss"] <= most for part, (least, most) in bounds.items()
    ), report.figures


@pytest.mark.parametrize("name", REACHED)
def test_a_preset_reaches_what_the_chapters_say(name, tmp_path):
    steps, bounds = REACHED[name]
    _, _, report = trained(name, tmp_path, steps=steps)
    within(report, bounds)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["linear", "rice-sigma-pi", "rice-mlp", "grain-mlp", "grain-experts"]
)
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_preset_does_not_depend_on_luck(name, seed, tmp_path):
    _, bounds = REACHED[name]
    _, _, report = trained(name, tmp_path, seed=seed)
    within(report, bounds)


@pytest.mark.long
def test_chapter_6_under_the_trainer_experts_keep_to_lines_where_a_network_does_not(tmp_path):
    far = {
        name: np.median(
            [
                trained(name, tmp_path / f"{name}-{seed}", seed=seed)[2].figures["beyond"]["loss"]
                for seed in range(5)
            ]
        )
        for name in ("lines-experts", "lines-mlp")
    }
    assert far["lines-experts"] < far["lines-mlp"] / 2


def test_the_law_is_found_and_said_in_words(tmp_path):
    model, task, report = trained("rice-sigma-pi", tmp_path, steps=800)
    assert report.weights == {"weight": pytest.approx([2, 2, 0], abs=2e-3)}
    said = task.sample(model, 40).splitlines()
    assert "10 cups of brown rice: 30 cups of water (30)" in said
    assert "1 cup of franken-grain: 4 cups of water (1)" in said
    assert task.sample(model, 0) == ""
    lines = task.score(model, "beyond").table().splitlines()
    assert "  10 cups of white rice: 20 cups of water (20)" in lines
    assert any(line.split() == ["franken", "loss", "9"] for line in lines)


def test_the_best_weights_are_kept_and_their_figures_are_flat_numbers(tmp_path):
    _, task, report = trained("linear", tmp_path, steps=50)
    assert (tmp_path / "model.safetensors").is_file()
    figures = report.to_json()
    assert figures["loss"] == figures["validation_loss"]
    assert figures.keys() == {"loss", *(f"{part}_loss" for part in task.splits)}
    assert all(isinstance(value, float) for value in figures.values())
    assert task.format_loss(0.25) == "validation: mean squared error 0.25"


def test_two_classes_are_the_same_to_logistic_and_softmax(tmp_path):
    _, task, logistic = trained("logistic", tmp_path / "one", steps=300)
    shared = dataclasses.replace(PRESETS["logistic"], model="softmax-table", steps=300)
    soft = Trainer(shared, tmp_path / "two", open_task(shared), torch.device("cpu"))
    assert soft.model.scores.weight.shape == (2, 2)
    (tmp_path / "two").mkdir()
    soft.train()
    report = task.score(soft.model, "validation")
    for name, least in (("loss", 0.02), ("accuracy", 0.01)):
        one, two = logistic.figures["train"][name], report.figures["train"][name]
        assert abs(one - two) < least
    assert logistic.figures["validation"]["accuracy"] > 0.95


def test_a_softmax_parts_grains_half_way_between_them(tmp_path):
    model, task, _ = trained("grain-softmax", tmp_path)
    weights, biases = model.scores.weight[:, 0], model.scores.bias
    borders = -(biases.diff() / weights.diff())
    assert borders.tolist() == pytest.approx([0.25, 0.75], abs=0.04)
    assert task.sample(model, 1).splitlines()[0].endswith("(white rice)")
    assert "% sure" in task.sample(model, 1)


def test_accuracy_is_the_share_of_rows_that_are_right():
    model = build_model("logistic", {"inputs": 2})
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([-2.5, 1.0]))
    task = opened("white-or-brown")
    x_BD, class_B = task.table.splits["validation"]
    expected = (model.classify(x_BD) == class_B).double().mean().item()
    assert task.score(model, "validation").figures["validation"]["accuracy"] == pytest.approx(
        expected
    )


def test_judging_leaves_the_model_as_it_was():
    task, model = opened("rice"), build_model("linear", {"inputs": 2})
    model.train()
    assert task.validate(model) == task.validate(model)
    assert model.training
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("run", "message"),
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
def test_what_does_not_fit_is_said(run, message):
    with pytest.raises(ValueError, match=message):
        check(run)


def test_experts_that_see_what_a_table_does_not_have_are_refused(tmp_path):
    run = dataclasses.replace(PRESETS["grain-experts"], task="square")
    with pytest.raises(ValueError, match=r"indices of the 1 inputs.*\[0\] and \[1\]"):
        Trainer(run, tmp_path, open_task(run), torch.device("cpu"))


def test_options_that_mean_nothing_are_options_of_a_run():
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert fields >= Numbers.unsupported_options

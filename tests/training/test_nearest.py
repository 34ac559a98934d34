"""The command `nearest`."""

import pytest
import torch

from gpt.checkpoint import save_config, save_tensors, unique_state_dict
from gpt.models.linear import Linear
from gpt.models.word2vec import Word2Vec
from tests.training.test_xray import make_run
from tokenizer import train_words
from training.evaluation.nearest import Nearest

WORDS = train_words(["cat dog sat cat dog cat"], 100)


@pytest.fixture
def run(tmp_path):
    """A word2vec run in which dog points nearly as cat does, and sat elsewhere."""
    torch.manual_seed(0)
    model = Word2Vec(WORDS.vocab_size, width=4)
    with torch.no_grad():
        model.embedding.weight[WORDS.word_token("cat")] = torch.tensor([1.0, 0, 0, 0])
        model.embedding.weight[WORDS.word_token("dog")] = torch.tensor([2.0, 0.2, 0, 0])
        model.embedding.weight[WORDS.word_token("sat")] = torch.tensor([-1.0, 0, 0, 0])
    save_config(tmp_path, "word2vec", {"vocab_size": WORDS.vocab_size, "width": 4})
    save_tensors(tmp_path / "model.safetensors", unique_state_dict(model))
    WORDS.save(tmp_path / "tokenizer.json")
    return str(tmp_path)


def test_the_nearest_word_comes_first_with_its_cosine(run, capsys):
    Nearest(run, "cat")()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " 0.995  ' dog'"
    assert lines[-1] == "-1.000  ' sat'"
    assert len(lines) == WORDS.vocab_size - 1
    Nearest(run, "cat", k=1)()
    assert capsys.readouterr().out.splitlines() == lines[:1]


def test_a_language_model_has_nearest_tokens_too(tmp_path, capsys):
    Nearest(str(make_run(tmp_path, "gpt")), "a", k=3)()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_mistakes_are_explained(run, tmp_path):
    with pytest.raises(ValueError, match="'horse' is not in the vocabulary"):
        Nearest(run, "horse")()
    with pytest.raises(ValueError, match="the word is empty"):
        Nearest(run, "")()
    with pytest.raises(ValueError, match="--k must be at least 1, not 0"):
        Nearest(run, "cat", k=0)()
    table = tmp_path / "table"
    table.mkdir()
    save_config(table, "linear", {})
    save_tensors(table / "model.safetensors", unique_state_dict(Linear()))
    with pytest.raises(ValueError, match="has no tokenizer"):
        Nearest(str(table), "cat")()

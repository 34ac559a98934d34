import pytest
import torch

from gpt import GPT
from tests.serving.running_browser import checked_pages, chromium
from tests.serving.running_server import CONTEXT_LENGTH, TOKENIZER


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(TOKENIZER.vocab_size, CONTEXT_LENGTH, width=16, depth=2, heads=2).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[-1] ** -0.5)
    with torch.no_grad():
        model.unembedding.weight[TOKENIZER.eos_token] = 0  # so that greedy outputs do not end
    return model


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser):
    with checked_pages(browser) as open_view:
        yield open_view

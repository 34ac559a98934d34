"""A run as a model of EleutherAI's evaluation harness (`lm-eval`), without a server.

Importing this file registers the model `tinygpt`, for `lm_eval.simple_evaluate` too. The library is
an extra: `pip install -e '.[clients]'`.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from gpt import LanguageModel
from gpt.checkpoint import find_run, load_model
from gpt.device import resolve_device
from gpt.generation import generate
from gpt.models.base import MAX_LOGITS
from gpt.sampling import SamplingParams
from training.evaluation.evaluate import (
    MAX_BATCH_TOKENS,
    evaluate,
    inference_mode,
    target_predictions,
)
from training.run_directory import load_run_tokenizer, load_training_config

Request = tuple[Any, list[int], list[int]]
"""What lm-eval caches the result by, the tokens of the context, and those of the continuation."""


class HarnessModel(TemplateLM):
    """A run of the task `text`. The arguments are those of `--model_args`.

    Args:
        run: Run: a name in runs/, or a path. Default: the newest under runs/.
        precision: Precision of matrix products, as in `tinygpt eval`.
        stride: Tokens that each window of a rolling log-likelihood scores, as in `tinygpt eval`.
        context_length: Tokens of a window. Default: the model's context length.
        device: auto, cpu, cuda, cuda:1, mps (`--device`).
        batch_size: Most sequences of a forward pass, or "auto" (`--batch_size`).
        max_batch_size: Most sequences if `batch_size` is "auto" (`--max_batch_size`).
        unknown: Other arguments, which are refused.
    """

    def __init__(
        self,
        run: str | None = None,
        precision: str = "float32",
        stride: int | None = None,
        context_length: int | None = None,
        device: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"--model_args has no {', '.join(unknown)}: it takes run, precision, stride and "
                "context_length"
            )
        directory = find_run(None if run is None else str(run))
        config, tokenizer = load_training_config(directory), load_run_tokenizer(directory)
        model = load_model(directory, resolve_device(device))
        if config.task != "text" or tokenizer is None or not isinstance(model, LanguageModel):
            raise ValueError(
                f"{directory}: lm-eval needs a run of the task text, not {config.task}"
            )
        self.tokenizer, self.model = tokenizer, model
        self.precision, self.stride, self.stateful = precision, stride, config.stateful
        self.context_length = context_length
        if not 1 <= (context_length or model.context_length) <= model.context_length:
            raise ValueError(
                f"context_length must be between 1 and {model.context_length}, not {context_length}"
            )
        self.max_rows = (max_batch_size or sys.maxsize) if batch_size == "auto" else int(batch_size)
        if self.max_rows < 1:
            raise ValueError(f"--batch_size must be at least 1 or auto, not {batch_size}")

    @property
    def eot_token_id(self) -> int:
        """The token before a document, and so before a text without context."""
        return self.tokenizer.eos_token

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,  # noqa: ARG002 (our tokenizers add none)
    ) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether each of its tokens is the likeliest.

        A context that is too long loses its first tokens. A tie is not the likeliest.
        """
        if not self.model.supports_chunked_prefill:
            raise ValueError(
                f"a model {type(self.model).__name__} predicts only the second half of a text: "
                "of lm-eval's tasks it can run those of rolling log-likelihoods"
            )
        limit = self.context_length or self.model.context_length
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows: list[list[int]] = []
        for _, context, continuation in requests:
            if len(continuation) > limit:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, the context {limit}"
                )
            rows.append((context + continuation)[-limit - 1 :])
        with (
            tqdm(total=len(rows), desc="scoring", disable=disable_tqdm, leave=False) as bar,
            inference_mode(self.model, self.precision) as device,
        ):
            for batch in self._batches(rows):
                lengths = [len(rows[number]) for number in batch]
                tokens_BT = torch.zeros(len(batch), max(lengths), dtype=torch.long)
                scored_BT = torch.zeros(len(batch), max(lengths), dtype=torch.bool)
                for tokens_T, scored_T, number in zip(tokens_BT, scored_BT, batch, strict=True):
                    row, num_scored = rows[number], len(requests[number][2])
                    tokens_T[: len(row)] = torch.tensor(row)
                    scored_T[len(row) - num_scored : len(row)] = True
                tokens_BT, scored_BT = tokens_BT.to(device), scored_BT[:, 1:].to(device)
                features_ND = self.model.features(tokens_BT[:, :-1])[scored_BT]
                targets_N = tokens_BT[:, 1:][scored_BT]
                columns_N3 = target_predictions(self.model.logits(features_ND), targets_N)
                counts = [len(requests[number][2]) for number in batch]
                for number, columns_C3 in zip(batch, columns_N3.cpu().split(counts), strict=True):
                    nll_C, rank_C, _ = columns_C3.double().unbind(-1)
                    results[number] = (-nll_C.sum().item(), bool((rank_C < 1).all()))
                bar.update(len(batch))
        for (key, *_), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the numbers of rows of similar length, the longest first."""
        max_tokens = min(MAX_BATCH_TOKENS, MAX_LOGITS // self.model.vocab_size)
        order = iter(sorted(range(len(rows)), key=lambda number: -len(rows[number])))
        for first in order:
            size = max(1, min(self.max_rows, max_tokens // len(rows[first])))
            yield [first, *itertools.islice(order, size - 1)]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of each text, as `tinygpt eval` scores a document."""
        results = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            ids = [self.eot_token_id, *self.tokenizer.encode(text)]
            logprob = 0.0
            if len(ids) > 1:
                predictions = evaluate(
                    self.model,
                    np.array(ids),
                    stride=self.stride,
                    context_length=self.context_length,
                    precision=self.precision,
                    stateful=self.stateful,
                )
                logprob = -float(predictions.nll_N.sum())
            results.append(logprob)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), logprob)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string or the document's end."""
        results = []
        for context, gen_kwargs in tqdm([r.args for r in requests], disable=disable_tqdm):
            options = normalize_gen_kwargs(gen_kwargs)
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
            given = {name: options[name] for name in names if name in options}
            params = SamplingParams(**{"temperature": 0.0, **given})
            if unknown := options.keys() - {*names, "until", "max_gen_toks", "do_sample"}:
                raise ValueError(f"no generation option {', '.join(sorted(unknown))} is known")
            text = self._continue(context, options["max_gen_toks"], options["until"], params)
            results.append(text)
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
        return results

    def _continue(
        self, context: str, max_tokens: int, until: Sequence[str], params: SamplingParams
    ) -> str:
        """Generate until a stop string. A context that is too long loses its first tokens."""
        prompt = self.tokenizer.encode(context) or [self.eot_token_id]
        if (max_length := self.model.max_length) is not None:
            room = max_length - max_tokens + 1  # the last token is never fed back
            if room < 1:
                raise ValueError(
                    f"{max_tokens} new tokens leave no room for a prompt in the context of "
                    f"{max_length}: give --gen_kwargs max_gen_toks={max_length // 2}"
                )
            prompt = prompt[-room:]
        text, stream = "", self.tokenizer.stream(prompt)
        with inference_mode(self.model, self.precision):
            for token in generate(self.model, prompt, max_tokens, params, {self.eot_token_id}):
                text += stream.push(token)
                if ends := [text.index(stop) for stop in until if stop and stop in text]:
                    return text[: min(ends)]
        return text + stream.flush()


register_model("tinygpt")(HarnessModel)


def run_harness(arguments: Sequence[str]) -> None:
    """Run `lm-eval run --model tinygpt` with further arguments."""
    from lm_eval.__main__ import cli_evaluate

    # The harness's own defaults are cuda:0 and a batch of 1; the last of equal options counts.
    defaults = ["--model", "tinygpt", "--device", "auto", "--batch_size", "auto"]
    sys.argv = ["lm-eval", "run", *defaults, *arguments]
    cli_evaluate()

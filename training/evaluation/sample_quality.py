"""The quality of sampled text by temperature: the command `sample-quality`.

The run continues prompts, which are excerpts of a text that it was not trained on. The same figures are
computed of the text's own continuations, which are of the same length:

    distinct-n      different n-grams / n-grams, over all samples together (Li et al. 2016)
    repetition      1 - different 4-grams / 4-grams of one sample, averaged over samples: seq-rep-4 of
                    Welleck et al. 2020
    loss            mean of -ln p(token | prompt and tokens before it) under a judge, another run;
                    exp(loss) is called generative perplexity
    bits per byte   the same by byte, so that the tokenizers of judges may differ

n-grams are of the run's tokens. A sample goes on after an end of text, as the text itself does.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tqdm import tqdm
from tyro.conf import arg

from gpt import LanguageModel, cli
from gpt.checkpoint import find_run, load_language_model
from gpt.cli import OptionalInt, OptionalPath, OptionalText
from gpt.device import resolve_device
from gpt.generation import recompute_logits
from gpt.sampling import NAN_LOGITS, Sampler, SamplingParams
from tokenizer import Tokenizer
from training.evaluation.analysis import Ints, bootstrap_interval
from training.evaluation.commands import choose_splits, markdown_row, markdown_table, open_text
from training.evaluation.evaluate import MAX_BATCH_TOKENS, evaluate, inference_mode
from training.run_directory import load_run_tokenizer, load_training_config
from training.tasks import TASKS

MAX_SAMPLES, MAX_TOKENS = 64, 100
"""Defaults, for texts and contexts that hold as much; a prompt is half as long (Welleck et al. 2020)."""


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of different n-grams among the n-grams of all texts; none spans two texts."""
    ngrams = [ngram for text in texts for ngram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(ngrams)) / len(ngrams)


def continue_prompts(
    model: LanguageModel, prompts_NT: Ints, max_tokens: int, params: SamplingParams
) -> Ints:
    """Return tokens_NT sampled after prompts of equal length: what `generate` samples as choices 0 to N - 1."""
    batch_size = max(1, MAX_BATCH_TOKENS // (prompts_NT.shape[1] + max_tokens))
    starts = range(0, len(prompts_NT), batch_size)
    return np.concatenate(
        [
            _continue_batch(
                model, prompts_NT[start : start + batch_size], max_tokens, params, start
            )
            for start in starts
        ]
    )


def _continue_batch(
    model: LanguageModel, prompts_BT: Ints, max_tokens: int, params: SamplingParams, choice: int
) -> Ints:
    batch_size, prompt_length = prompts_BT.shape
    outputs_BT = np.empty((batch_size, 0), np.int64)

    def recompute(row: int) -> torch.Tensor:
        return recompute_logits(model, prompts_BT[row].tolist(), outputs_BT[row].tolist())

    with inference_mode(model) as device:
        sampler = Sampler(batch_size, model.vocab_size, device)
        for row in range(batch_size):
            sampler.add_sequence(row, params, (), choice + row)
        state = model.init_state(batch_size, prompt_length + max_tokens - 1)
        view = model.prefix_view(state, prompt_length)
        features_BD = model.prefill(torch.from_numpy(prompts_BT).to(device), view)
        while True:
            tokens_B1 = sampler(model.logits(features_BD), recompute=recompute).unsqueeze(1)
            outputs_BT = np.concatenate([outputs_BT, tokens_B1.cpu().numpy()], axis=1)
            if (outputs_BT[:, -1] < 0).any():
                raise ValueError(NAN_LOGITS)
            if outputs_BT.shape[1] == max_tokens:
                return outputs_BT
            view = model.prefix_view(state, prompt_length + outputs_BT.shape[1])
            features_BD = model.features(tokens_B1, view)[:, -1]


@dataclass(frozen=True)
class Judge:
    """A language model that scores continuations of another run's tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer
    stateful: bool
    source: Tokenizer
    """The tokenizer of what is scored."""
    has_bytes: bool
    """Whether the source's tokens hold all of the text, so that there are figures per byte."""

    def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> tuple[float, int, int]:
        """Return nll, tokens and bytes of a continuation, in the judge's own tokens."""
        context = self._retokenize(prompt) or [self.tokenizer.eos_token]
        targets = self._retokenize(continuation)
        predictions = evaluate(
            self.model,
            np.array(context + targets),
            precision="float32",
            stateful=self.stateful,
        )
        num_bytes = sum(len(self.tokenizer.token_bytes(token)) for token in targets)
        return float(predictions.nll_N[len(context) - 1 :].sum()), len(targets), num_bytes

    def _retokenize(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens of the same documents; equal tokenizers keep them as they were sampled."""
        if self.tokenizer.fingerprint == self.source.fingerprint:
            return list(tokens)
        result: list[int] = []
        for is_end, group in itertools.groupby(tokens, lambda t: t == self.source.eos_token):
            if is_end:
                result += [self.tokenizer.eos_token for _ in group]
                continue
            text = b"".join(map(self.source.token_bytes, group)).decode(errors="replace")
            starts_document = result[-1:] == [self.tokenizer.eos_token]
            result += self.tokenizer.encode_batch([text], [not starts_document])[0]
        return result


def measure(prompts_NT: Ints, texts_NT: Ints, judge: Judge) -> dict[str, Any]:
    """Return the figures of continuations, with 95% intervals over samples."""
    texts = texts_NT.tolist()
    scores = [judge.score(*pair) for pair in zip(prompts_NT.tolist(), texts, strict=True)]
    nll_N, tokens_N, bytes_N = np.array(scores).T
    if not np.isfinite(nll_N).all():
        raise ValueError("the judge's loss is not finite: its weights may be damaged")
    repetition_N = np.array([1 - distinct([text], 4) for text in texts])
    ratios = {
        "repetition": (repetition_N, np.ones_like(repetition_N)),
        "loss": (nll_N, tokens_N),
    }
    if judge.has_bytes and bytes_N.all():  # a sample may be nothing but ends of text
        ratios["bits_per_byte"] = (nll_N, bytes_N * math.log(2))
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        **{name: float(top_N.sum() / base_N.sum()) for name, (top_N, base_N) in ratios.items()},
        "intervals": {
            name: bootstrap_interval(np.column_stack(columns), np.divide)
            for name, columns in ratios.items()
        },
    }


@dataclass(frozen=True)
class SampleQuality:
    """Measure text that a run samples beside the text itself, by temperature.

    The run continues excerpts of a text. The text's own continuations have the same figures:
    good samples come near them.
    - distinct-n = different n-grams / n-grams of all samples; falls as their number and length grow
    - repetition = 1 - different 4-grams / 4-grams of a sample, averaged
    - loss = nll / tokens under the judge; exp(loss) is the generative perplexity
    - bits per byte = nll / (ln 2 * bytes) under the judge
    - n-grams are of the run's tokens: comparable only under the same tokenizer
    - [low, high]: 95% interval, by a bootstrap over samples
    """

    run: cli.OptionalRun = None
    """Run: a name in runs/, or a path. Default: the newest under runs/."""
    judge: OptionalText = None
    """Run that scores the samples: best a larger one of the same kind of text. Default: RUN itself."""
    temperatures: Annotated[tuple[float, ...], arg(metavar="FLOAT …")] = (0, 0.5, 0.7, 1, 1.3)
    """Temperatures to sample at; 0 always takes the likeliest token."""
    data: OptionalText = None
    """Text that is continued, as in `train --data`. Default: the validation split of the run's own corpus."""
    samples: OptionalInt = None
    """Samples for each temperature. Default: 64, or as many as the text has prompts for."""
    tokens: OptionalInt = None
    """Tokens of a sample; its prompt has half as many. Default: 100, or what the context holds."""
    seed: int = 0
    """Seed of the samples."""
    output: OptionalPath = None
    """File of a plot: .svg, .png or .pdf."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    json: bool = False
    """Print one JSON object."""

    def __call__(self) -> None:
        """Sample, score and print."""
        if self.output:
            from training.plots.style import check_output

            check_output(self.output)
        if not self.temperatures:
            raise ValueError("which temperatures? `--temperatures 0 0.7 1`")
        all_params = [SamplingParams(temperature=t, seed=self.seed) for t in self.temperatures]
        run, judge_run = find_run(self.run), find_run(self.judge or self.run)
        task = open_text(run, self.data, "sample-quality")
        [split] = choose_splits(task, (), own_corpus=self.data is None)
        data = task.split_of(task.parts[0], split)
        device = resolve_device(self.device)
        model = load_language_model(run, device)
        judge = open_judge(judge_run, device, task.tokenizer, data.lost)
        samples, tokens = self._sizes(model, len(data.tokens))
        window = tokens // 2 + tokens
        starts_N1 = np.linspace(0, len(data.tokens) - window, samples, dtype=int)[:, None]
        windows_NT = data.tokens[starts_N1 + np.arange(window)].astype(np.int64)
        prompts_NT, own_NT = np.split(windows_NT, [tokens // 2], axis=1)
        rows = [{"text": f"{split} text", **measure(prompts_NT, own_NT, judge)}]
        for params in tqdm(all_params, desc="temperatures", leave=False, disable=None):
            texts_NT = continue_prompts(model, prompts_NT, tokens, params)
            row = {"text": "samples", "temperature": params.temperature}
            rows.append({**row, **measure(prompts_NT, texts_NT, judge)})
        if self.output:
            from training.plots.evaluation import plot_sample_quality

            plot_sample_quality(rows, self.output)
        if self.json:
            source = {"run": str(run), "judge": str(judge_run), "data": task.description}
            sizes = {"samples": samples, "tokens": tokens, "seed": self.seed}
            print(json.dumps({**source, "split": split, **sizes, "rows": rows}))
            return
        for row in rows[1:]:
            row["text"] = f"temperature {row.pop('temperature'):g}"
        print(markdown_table([markdown_row(row) for row in rows]))
        print(
            f"\n{run}: {samples} samples of {tokens} tokens that continue the {split} split of "
            f"{task.description}. Loss and bits per byte are under {judge_run}. In brackets: 95% "
            "intervals, bootstrapped over samples."
        )
        if self.output:
            print(self.output)

    def _sizes(self, model: LanguageModel, text_length: int) -> tuple[int, int]:
        """Return the number of samples and their tokens; a ValueError if they do not fit."""
        limit = text_length if model.max_length is None else model.max_length
        tokens = self.tokens
        if tokens is None:
            tokens = min(MAX_TOKENS, min(model.context_length, limit) * 2 // 3)
        window = tokens // 2 + tokens
        if tokens < 4 or window - 1 > limit:  # the last token is never fed back
            raise ValueError(
                f"--tokens must be at least 4, and with a prompt of half as many fit in {limit}, "
                f"not {tokens}"
            )
        room = text_length // window
        samples = min(MAX_SAMPLES, room) if self.samples is None else self.samples
        if not 2 <= samples <= room:
            raise ValueError(
                f"the text has room for {room} prompts with --tokens {tokens}: --samples must be at "
                f"least 2 and at most that, not {samples}; or give a longer text as --data"
            )
        return samples, tokens


def open_judge(run: Path, device: torch.device, source: Tokenizer, lost: str) -> Judge:
    """Load a judge; its tokenizer must be that of the samples, or both must hold any text."""
    config, tokenizer = load_training_config(run), load_run_tokenizer(run)
    if TASKS[config.task].kind != "text" or tokenizer is None:
        raise ValueError(f"{run}: a judge is a run of the task text, not {config.task}")
    unknown = "unknown words or characters" * (tokenizer.unk_token is not None)
    loss = lost or tokenizer.lost_text or unknown
    if loss and tokenizer.fingerprint != source.fingerprint:
        raise ValueError(
            f"{run} has another tokenizer than the samples, and text is lost between them ({loss}): "
            "choose a judge with the same tokenizer"
        )
    model = load_language_model(run, device)
    return Judge(model, tokenizer, config.stateful, source, has_bytes=not lost)

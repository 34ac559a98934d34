"""The engine: continuous batching of requests over one model. Synchronous; token ids in and out.

Continuous batching (Yu et al. 2022, "Orca"): a sequence joins the batch when a slot is free and
leaves it when it ends, whatever the others do. Slots [0, n) hold the running sequences; a freed
slot is filled with the last one. A slice of a State is a view, so a decode step of the batch is
`features(last_tokens, batch_slice(state, 0, n))`: the engine knows nothing else about a model.

A step decodes a token for each running sequence and spends the rest of its token budget on the
prompt at the head of the waiting queue, in chunks and in a state of its own (chunked prefill,
Agrawal et al. 2023): a long prompt delays no other sequence. The prefilled state is then copied
to a slot for each of the request's choices.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from gpt.beam_search import beam_search
from gpt.generation import clamp_max_tokens, prefill, recompute_logits
from gpt.kernels.quantization import has_exact_logits
from gpt.models.base import LanguageModel, State, batch_slice, copy_state
from gpt.sampling import NAN_LOGITS, RANDOM_STATE, TIE_MARGIN, Sampler, mask_logits
from serving.engine.cuda_graphs import GraphRunner
from serving.engine.sequence import (
    FinishReason,
    InvalidRequestError,
    Prefill,
    Request,
    RunningSequence,
    SequenceOutput,
    TokenLogprobs,
    compute_logprobs,
)
from serving.engine.steps import StepKind, eager_step

MAX_NUM_BATCHED_TOKENS = 256
"""Tokens that a step processes, decoded ones and prefill chunks together."""
MIN_PREFILL_COST = 64
"""Tokens of the budget that a prefill costs at least: loading the weights takes that long."""
LENGTH_BUCKET = 32
"""Sequence lengths are rounded up to a multiple of this, so that one view serves many steps."""


class Engine:
    """Generates sequences for many requests at once with one model.

    Args:
        model: The model.
        max_num_seqs: Number of slots: the most sequences that run at once.
        max_model_len: The most positions of a sequence, prompt and output together; the model's own
            limit if that is smaller.
        max_num_batched_tokens: Tokens that a step processes.
        deterministic: Compute each sequence in a batch of its own, so that it is the same to the
            last bit whatever else runs. Many sequences then take as long as one after the other.
        num_scheduler_steps: Decode steps before tokens are read back, where all sequences are
            greedy or sampled without sorting. For models so small that reading a token back takes
            as long as computing it.
        cuda_graphs: Capture decode steps as CUDA graphs, and run `num_scheduler_steps` of them with
            any sampling parameters.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_num_seqs: int,
        max_model_len: int | None = None,
        *,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        deterministic: bool = False,
        num_scheduler_steps: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1 or num_scheduler_steps < 1:
            raise ValueError(
                "max_num_seqs, max_num_batched_tokens and num_scheduler_steps must be at least 1, "
                f"not {max_num_seqs}, {max_num_batched_tokens} and {num_scheduler_steps}"
            )
        self.model, self.max_num_seqs = model, max_num_seqs
        self.max_num_batched_tokens, self.deterministic = max_num_batched_tokens, deterministic
        self.num_scheduler_steps = num_scheduler_steps
        limits = [limit for limit in (model.max_length, max_model_len) if limit is not None]
        self.max_model_len = min(limits, default=None)
        self.cache_length = self.max_model_len or model.context_length
        self.state = model.init_state(max_num_seqs, self.cache_length)
        self.empty_state = model.prefix_view(model.init_state(1, 1), 0)
        self.prefill_state = model.init_state(1, self.cache_length)
        self.device = next(model.parameters()).device
        self.sampler = Sampler(max_num_seqs, model.vocab_size, self.device)
        self.last_tokens_B1 = torch.zeros(max_num_seqs, 1, dtype=torch.long, device=self.device)
        self.waiting: deque[Request] = deque()
        self.prefill: Prefill | None = None
        self.running: list[RunningSequence] = []
        self.beam_searches: dict[Request, Generator[None, None, list[list[int]]]] = {}
        self.steps: dict[StepKind, Callable[..., Sequence[Tensor]]] = {
            kind: eager_step(model, kind) for kind in get_args(StepKind)
        }
        """Runs each kind of step. Any thread may replace one by a compiled one at any time."""
        self.graph_runner = None
        if cuda_graphs and not deterministic:
            self.graph_runner = GraphRunner(
                model,
                self.state,
                self.empty_state,
                self.sampler.state,
                self.last_tokens_B1,
                self.cache_length,
            )
        # Otherwise the batch changes logits less than the GPU or the number format does.
        self.breaks_ties = has_exact_logits(model)
        self._views: tuple[tuple[int, int, int], State, State] = ((0, 0, 0), {}, {})
        """Slots and length of the last decode step, with their views of both states."""

    @property
    def is_idle(self) -> bool:
        """True when there is nothing to do: no request waits and no sequence runs."""
        return not (self.waiting or self.running or self.beam_searches)

    @property
    def num_compiled_steps(self) -> int:
        """Number of kinds of steps that run compiled."""
        return sum(not isinstance(step, nn.Module) for step in self.steps.values())

    @property
    def num_free_slots(self) -> int:
        """Number of free slots. A beam search has no slot but counts as one: it takes as long."""
        return self.max_num_seqs - len(self.running) - len(self.beam_searches)

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights, states and sampler, all of which are allocated from the start."""
        states = [*self.state.values(), *self.prefill_state.values(), *self.sampler.state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *states]
        return sum(tensor.nbytes for tensor in tensors)

    def validate(self, request: Request) -> int:
        """Return the most tokens that each sequence of a request can have.

        Raises:
            ValueError: The request can never be served; the message says why.
            InvalidRequestError: The same, because of a field other than the prompt.
        """
        start_token, limit = request.decoder_start_token, self.max_model_len
        max_tokens = clamp_max_tokens(
            self.model, request.prompt, request.max_tokens, limit, start_token
        )
        params, vocab_size = request.sampling_params, self.model.vocab_size
        for token, _ in params.logit_bias:
            if token >= vocab_size:
                message = f"logit_bias has token {token}, the model knows 0 to {vocab_size - 1}"
                raise InvalidRequestError("logit_bias", message)
        first_tokens = request.allowed_first_tokens or range(vocab_size)
        if params.min_tokens and {*request.stop_tokens}.issuperset(first_tokens):
            message = "min_tokens leaves no token to sample: every one is a stop token"
            raise InvalidRequestError("min_tokens", message)
        translates = start_token is not None
        if request.prompt_logprobs and (translates or not self.model.supports_chunked_prefill):
            raise InvalidRequestError(
                "echo",
                "this model cannot return logprobs of the prompt: its prompt is encoded as a whole, "
                "and only the output is predicted",
            )
        if request.num_beams > 1:
            if not translates:
                message = "num_beams is for translation models: leave it out"
                raise InvalidRequestError("num_beams", message)
            for param, is_default in (
                ("n", request.n == 1),
                ("logprobs", request.logprobs is None),
                ("temperature", params.greedy),
                ("min_tokens", params.min_tokens == 0),
            ):
                if not is_default:
                    raise InvalidRequestError(
                        param,
                        "beam search returns one sequence, the best: set n to 1, temperature to 0, "
                        "no logprobs, no min_tokens",
                    )
        return max_tokens

    def add_request(self, request: Request) -> None:
        """Add a request to the waiting queue; a ValueError says why it can never be served."""
        self.validate(request)
        self.waiting.append(request)

    def abort(self, request: Request, choice: int | None = None) -> None:
        """Drop a request, or one of its sequences, wherever it is. It has no further output."""
        for slot in reversed(range(len(self.running))):
            sequence = self.running[slot]
            if sequence.request is request and choice in (None, sequence.choice):
                self._free_slot(slot)
        if choice is None:
            self.beam_searches.pop(request, None)
            if request in self.waiting:
                self.waiting.remove(request)
                if self.prefill and self.prefill.request is request:
                    self.prefill = None

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """Decode a token for each running sequence, then prefill within the rest of the budget."""
        outputs = self._decode() if self.running else []
        outputs += self._step_beam_searches()
        budget = max(self.max_num_batched_tokens - len(self.running), 1)
        while budget > 0 and self.waiting and self.num_free_slots > 0:
            request = self.waiting[0]
            # How a prompt is split may change its rounding, so it must not depend on the others.
            max_tokens = self.max_num_batched_tokens if self.deterministic else budget
            try:
                num_tokens = self._prefill_chunk(request, max_tokens)
                budget -= max(num_tokens, MIN_PREFILL_COST)
                outputs += self._start_sequences()
            except Exception as error:  # the running sequences are not affected
                started = self.prefill.num_started if self.prefill else 0
                outputs += [_failure(request, i, error) for i in range(started, request.n)]
                self._pop_waiting()
        return outputs

    # Decode.

    def _decode(self) -> list[SequenceOutput]:
        count = len(self.running)
        try:
            if self.graph_runner:
                outputs = self._decode_with_graphs(self.graph_runner)
            else:
                size, outputs = 1 if self.deterministic else count, []
                for slot in range(0, count, size):
                    outputs += self._decode_slots(slot, slot + size)
        except Exception as error:  # such as out of memory: the waiting requests are not affected
            failures = [_failure(seq.request, seq.choice, error) for seq in self.running]
            self.running = []
            return failures
        ended = {(output.request, output.choice) for output in outputs if output.finish_reason}
        # Backwards: the sequence that moves to a freed slot has been checked.
        for slot in reversed(range(count)):
            sequence = self.running[slot]
            if (sequence.request, sequence.choice) in ended:
                self._free_slot(slot)
        return outputs

    def _decode_slots(self, start: int, stop: int) -> list[SequenceOutput]:
        """Decode the sequences in slots [start, stop)."""
        if all(_samples_in_step(sequence.request) for sequence in self.running[start:stop]):
            return self._decode_multi_step(start, stop)
        return self._decode_single_step(start, stop)

    def _decode_single_step(self, start: int, stop: int) -> list[SequenceOutput]:
        """Decode one token of each sequence in slots [start, stop), with the sampler."""
        sequences = self.running[start:stop]
        length = max(sequence.length for sequence in sequences)
        logits_BV = self._run_step(start, stop, length, samples=False)[0]
        tokens_B = self._sample(logits_BV, start, sequences)
        self.last_tokens_B1[start:stop, 0] = tokens_B.clamp(min=0)
        tokens = tokens_B.tolist()
        logprobs = self._logprobs(logits_BV, sequences, tokens)
        return list(map(self._append_token, range(start, stop), tokens, logprobs))

    def _decode_multi_step(self, start: int, stop: int) -> list[SequenceOutput]:
        """Decode the sequences in slots [start, stop), for several steps that sample themselves."""
        sequences = self.running[start:stop]
        length, num_steps = self._plan_steps(sequences)
        samples = not all(sequence.request.sampling_params.greedy for sequence in sequences)
        steps = [self._run_step(start, stop, length + i, samples)[1:] for i in range(num_steps)]
        tokens_NB = torch.stack([tokens_B for tokens_B, _ in steps]).tolist()
        margin_NB = torch.stack([margin_B for _, margin_B in steps])
        min_margin = TIE_MARGIN if self.breaks_ties and self.model.vocab_size > 1 else 0
        # Not `<`: a margin may be NaN.
        near_tie_NB = (~(margin_NB >= min_margin)).tolist()
        outputs = []
        for i, sequence in enumerate(sequences):
            for tokens_B, near_tie_B in zip(tokens_NB, near_tie_NB, strict=True):
                token = self._recompute_greedy(sequence) if near_tie_B[i] else tokens_B[i]
                outputs.append(self._append_token(start + i, token))
                if outputs[-1].finish_reason:
                    break
                if token != tokens_B[i]:  # the other steps went on from the wrong token
                    self._restore_slot(start + i)
                    break
        return outputs

    def _decode_with_graphs(self, graph_runner: GraphRunner) -> list[SequenceOutput]:
        """Decode all running sequences with CUDA graphs, for several steps unless logprobs are wanted."""
        count = len(self.running)
        length, num_steps = self._plan_steps(self.running)
        if any(sequence.request.logprobs is not None for sequence in self.running):
            num_steps = 1
        flags, steps = self.sampler.flags(0, count), []
        for i in range(num_steps):
            logits_BV, tokens_B = graph_runner(count, length + i, flags)
            steps.append(tokens_B.clone())
        tokens_NB = torch.stack(steps).tolist()
        logprobs = self._logprobs(logits_BV, self.running, tokens_NB[0])
        outputs = []
        for slot in range(count):
            for tokens_B in tokens_NB:
                outputs.append(self._append_token(slot, tokens_B[slot], logprobs[slot]))
                if outputs[-1].finish_reason:
                    break
        return outputs

    def _plan_steps(self, sequences: Sequence[RunningSequence]) -> tuple[int, int]:
        """Return the longest sequence's length, and how many decode steps to run from there."""
        length = max(sequence.length for sequence in sequences)
        num_steps = max(sequence.max_tokens - len(sequence.tokens) for sequence in sequences)
        if self.max_model_len is not None:
            # A translation may have positions of its own: its source and output may be longer.
            num_steps = min(num_steps, max(1, self.cache_length - length + 1))
        return length, min(self.num_scheduler_steps, num_steps)

    def _run_step(self, start: int, stop: int, length: int, samples: bool) -> Sequence[Tensor]:
        """Run a `DecodeStep` of slots [start, stop), whose sequences have at most `length` tokens.

        Only with `samples` may the step sample tokens and advance the sampler's random streams.
        """
        length = min(-(-length // LENGTH_BUCKET) * LENGTH_BUCKET, self.cache_length)
        key = start, stop, length
        if self._views[0] != key:
            state = self.model.prefix_view(batch_slice(self.state, start, stop), length)
            random_state = {name: self.sampler.state[name][start:stop] for name in RANDOM_STATE}
            self._views = key, state, random_state
        _, state, random_state = self._views
        last_tokens_B1 = self.last_tokens_B1[start:stop]
        step = self.steps["decode" if stop - start > 1 else "decode_one"]
        if not samples:
            if isinstance(step, nn.Module):
                return step(last_tokens_B1, state)
            # A compiled step always samples: let it advance a copy.
            random_state = random_state | {"position": random_state["position"].clone()}
        return step(last_tokens_B1, state, random_state)

    def _recompute_logits(self, sequence: RunningSequence) -> Tensor:
        """Return logits_V of a sequence's next token, computed in a batch of one."""
        request = sequence.request
        logits_V = recompute_logits(
            self.model, request.prompt, sequence.tokens, request.decoder_start_token
        )
        if sequence.tokens:
            return logits_V
        return mask_logits(logits_V.unsqueeze(0), request.allowed_first_tokens)[0]

    def _recompute_greedy(self, sequence: RunningSequence) -> int:
        """Return a sequence's most likely next token, computed in a batch of one; -1 if not finite."""
        logits_V = self._recompute_logits(sequence)
        return int(logits_V.argmax()) if bool(logits_V.max().isfinite()) else -1

    def _restore_slot(self, slot: int) -> None:
        """Roll a slot's state back to its sequence after discarding steps that ran ahead of it."""
        sequence = self.running[slot]
        request, tokens = sequence.request, sequence.tokens
        prompt_1T = torch.tensor([list(request.prompt)], device=self.device)
        state, _ = prefill(self.model, prompt_1T, self.cache_length, request.decoder_start_token)
        if tokens[:-1]:
            tokens_1T = torch.tensor([tokens[:-1]], device=self.device)
            self.model.features(tokens_1T, self.model.prefix_view(state, sequence.length))
        self._copy_to_slot(state, slot, sequence.length)
        self.last_tokens_B1[slot] = tokens[-1]

    def _sample(
        self, logits_BV: Tensor, start: int, sequences: Sequence[RunningSequence]
    ) -> Tensor:
        """Return tokens_B of these sequences, in slots from `start` on, by their own parameters."""

        def recompute(slot: int) -> Tensor:
            return self._recompute_logits(sequences[slot - start])

        return self.sampler(logits_BV, start, recompute if self.breaks_ties else None)

    def _logprobs(
        self, logits_BV: Tensor, sequences: Sequence[RunningSequence], tokens: Sequence[int]
    ) -> list[TokenLogprobs | None]:
        """Return the logprobs of each sequence's token, None where its request wants none."""
        rows = [i for i, seq in enumerate(sequences) if seq.request.logprobs is not None]
        if not rows:
            return [None] * len(sequences)
        row_tokens = [max(tokens[i], 0) for i in rows]
        num_top = [sequences[i].request.logprobs or 0 for i in rows]
        logprobs = compute_logprobs(logits_BV[rows], row_tokens, num_top)
        by_row = dict(zip(rows, logprobs, strict=True))
        return [by_row.get(i) for i in range(len(sequences))]

    def _append_token(
        self,
        slot: int,
        token: int,
        logprobs: TokenLogprobs | None = None,
        prompt_logprobs: Sequence[TokenLogprobs] = (),
    ) -> SequenceOutput:
        """Append a token to the sequence in a slot, unless it is a stop token or -1 (NaN logits)."""
        sequence = self.running[slot]
        request, choice = sequence.request, sequence.choice
        if token < 0:
            return _failure(request, choice, ValueError(NAN_LOGITS))
        if token in request.stop_tokens:
            return SequenceOutput(request, choice, None, "stop", logprobs, prompt_logprobs)
        sequence.tokens.append(token)
        is_full = len(sequence.tokens) == sequence.max_tokens
        reason: FinishReason | None = "length" if is_full else None
        return SequenceOutput(request, choice, token, reason, logprobs, prompt_logprobs)

    def _free_slot(self, slot: int) -> None:
        """Free a slot, and move the last running sequence to it."""
        last = len(self.running) - 1
        if slot != last:
            last_state = batch_slice(self.state, last, last + 1)
            self._copy_to_slot(last_state, slot, self.running[last].length)
            self.last_tokens_B1[slot] = self.last_tokens_B1[last]
            self.sampler.move(last, slot)
            self.running[slot] = self.running[last]
        self.running.pop()

    def _copy_to_slot(self, state: State, slot: int, length: int) -> None:
        """Copy the first `length` positions of a state with one row to a slot."""
        slot_state = self.model.prefix_view(batch_slice(self.state, slot, slot + 1), length)
        copy_state(slot_state, self.model.prefix_view(state, length))

    # Prefill.

    def _prefill_chunk(self, request: Request, max_tokens: int) -> int:
        """Prefill up to `max_tokens` tokens of the head of the waiting queue; return their number."""
        if self.prefill is None:
            copy_state(self.model.prefix_view(self.prefill_state, 0), self.empty_state)
            self.prefill = Prefill(request, self.prefill_state)
            request.prefill_started = time.perf_counter()
        progress, prompt = self.prefill, request.prompt
        if progress.logits_1V is not None:
            return 0
        if request.num_beams > 1:
            self._start_beam_search(request)
            return len(prompt)
        start = progress.num_computed_tokens
        if request.decoder_start_token is not None or not self.model.supports_chunked_prefill:
            stop = len(prompt)
            prompt_1T = torch.tensor([list(prompt)], device=self.device)
            progress.state, features_1D = prefill(
                self.model, prompt_1T, self.cache_length, request.decoder_start_token
            )
        else:
            stop = min(start + max_tokens, len(prompt))
            chunk_1T = torch.tensor([list(prompt[start:stop])], device=self.device)
            state = self.model.prefix_view(progress.state, stop)
            if stop - start > 1:
                (features_1TD,) = self.steps["prefill"](chunk_1T, state)
            else:
                features_1TD = self.model.features(chunk_1T, state)
            if request.prompt_logprobs:
                self._add_prompt_logprobs(progress, features_1TD)
            features_1D = features_1TD[:, -1]
        progress.num_computed_tokens = stop
        if stop == len(prompt):
            progress.logits_1V = self.model.logits(features_1D)
        return stop - start

    def _add_prompt_logprobs(self, progress: Prefill, features_1TD: Tensor) -> None:
        """Add the logprobs of the prompt tokens that the features of the next chunk predict."""
        request, start = progress.request, progress.num_computed_tokens
        targets = request.prompt[start + 1 : start + features_1TD.shape[1] + 1]
        if targets:
            logits_TV = self.model.logits(features_1TD[0, : len(targets)])
            top = [request.logprobs or 0] * len(targets)
            progress.prompt_logprobs += compute_logprobs(logits_TV, targets, top)

    def _start_sequences(self) -> list[SequenceOutput]:
        """Start the sequences of a completed prefill, as far as there are free slots."""
        progress = self.prefill
        if progress is None or progress.logits_1V is None:
            return []
        request, outputs = progress.request, []
        max_tokens = self.validate(request)
        while progress.num_started < request.n and self.num_free_slots > 0:
            slot, choice = len(self.running), progress.num_started
            prompt_logprobs = progress.prompt_logprobs if choice == 0 else ()
            if max_tokens == 0:
                progress.num_started += 1
                output = SequenceOutput(request, choice, None, "length", None, prompt_logprobs)
                outputs.append(output)
                continue
            sequence = RunningSequence(request, choice, max_tokens)
            self._copy_to_slot(progress.state, slot, sequence.length)
            self.sampler.add_sequence(
                slot,
                request.sampling_params,
                request.prompt,
                choice,
                stop_tokens=request.stop_tokens,
            )
            logits_1V = mask_logits(progress.logits_1V, request.allowed_first_tokens)
            token_B = self._sample(logits_1V, slot, [sequence])
            self.last_tokens_B1[slot] = token_B.clamp(min=0)
            token = int(token_B)
            (logprobs,) = self._logprobs(progress.logits_1V, [sequence], [token])
            progress.num_started += 1
            self.running.append(sequence)
            outputs.append(self._append_token(slot, token, logprobs, prompt_logprobs))
            if outputs[-1].finish_reason:
                self._free_slot(slot)
        if progress.num_started == request.n:
            self._pop_waiting()
        return outputs

    def _pop_waiting(self) -> None:
        """Remove the head of the waiting queue, and its prefill."""
        self.waiting.popleft()
        self.prefill = None

    # Beam search.

    def _start_beam_search(self, request: Request) -> None:
        assert request.decoder_start_token is not None
        (eos_token,) = request.stop_tokens
        self.beam_searches[request] = beam_search(
            self.model,
            [request.prompt],
            decoder_start_token=request.decoder_start_token,
            eos_token=eos_token,
            max_tokens=self.validate(request),
            num_beams=request.num_beams,
        )
        self._pop_waiting()

    def _step_beam_searches(self) -> list[SequenceOutput]:
        """Run one step of each beam search; return the whole output of those that end."""
        outputs = []
        for request, search in list(self.beam_searches.items()):
            try:
                next(search)
                continue
            except StopIteration as result:
                (tokens,) = result.value
                outputs += [SequenceOutput(request, 0, token) for token in tokens]
                stopped = len(tokens) < self.validate(request)
                outputs.append(SequenceOutput(request, 0, None, "stop" if stopped else "length"))
            except Exception as error:  # the other searches are not affected
                outputs.append(_failure(request, 0, error))
            del self.beam_searches[request]
        return outputs


def _samples_in_step(request: Request) -> bool:
    """True if a `DecodeStep` can sample a request: no logprobs, adjusted logits, top-k or top-p."""
    params = request.sampling_params
    sorts = not params.greedy and (params.top_k > 0 or params.top_p < 1)
    return not (params.adjusted or sorts or request.logprobs is not None)


def _failure(request: Request, choice: int, error: Exception) -> SequenceOutput:
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return SequenceOutput(request, choice, None, "error", error=message)

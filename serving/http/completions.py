"""One completion, from its request to its response: tokenized prompts, engine outputs, JSON or events."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.engine.async_engine import UnavailableError
from serving.engine.sequence import Request, SequenceOutput, TokenLogprobs
from serving.http.limits import Limits
from serving.http.protocol import (
    APIError,
    CompletionRequest,
    StreamOptions,
    bad_request,
    to_api_error,
    to_json,
)
from serving.http.registry import ModelEntry
from serving.tokenization import (
    IncrementalDetokenizer,
    PromptTokens,
    TextStream,
    decode_prompt,
    token_text,
    tokenize_prompt,
    tokenize_source,
)
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SERVER_ID, COMPLETION_NUMBERS = secrets.token_hex(8), itertools.count(1)
"""Parts of a completion's id: a random number for each would take up to half a millisecond."""
MAX_PROMPT_TOKENS = 65_536
"""Default limit for models without a maximum sequence length."""
OBFUSCATION_SIZE = 64
"""Bytes of which the length of an obfuscated event is a multiple."""


def encode_prompt(
    entry: ModelEntry,
    prompt: str | list[int],
    limits: Limits,
    request: CompletionRequest | None = None,
) -> PromptTokens:
    """Tokenize a prompt, of a completion request or, without one, of a request by its defaults.

    Raises:
        ValueError: The prompt is too long, empty, or has tokens outside the vocabulary.
    """
    tokenizer, request = entry.tokenizer, request or CompletionRequest.model_validate({})
    if not isinstance(prompt, str):
        check_token_ids(tokenizer, prompt, "the prompt")
        tokens = PromptTokens(prompt)
    elif entry.is_translation:
        tokens = tokenize_source(tokenizer, prompt)
    else:
        # Where the response has the prompt's tokens, they must be all of it.
        heal = not request.needs_prompt_tokens
        prepend_eos = request.add_special_tokens
        tokens = tokenize_prompt(tokenizer, prompt, prepend_eos=prepend_eos, heal=heal)
    # Where the model has a limit, the engine's own error message is more precise.
    default = MAX_PROMPT_TOKENS if entry.max_model_len is None else math.inf
    limit = limits.max_prompt_tokens or default
    size = request.truncate_prompt_tokens
    if size == -1:
        max_length = entry.max_prompt_length(request.max_tokens)
        size = int(limit if max_length is None else min(limit, max_length))
        if size < 1:
            message = f"max_tokens = {request.max_tokens} leaves no room for a prompt"
            raise APIError(400, f"{message}: truncate_prompt_tokens = -1 needs less", "max_tokens")
    is_truncated = size is not None and len(tokens.ids) > size
    if size is not None and is_truncated:
        tokens = tokens._replace(ids=tokens.ids[-size:], eos_prepended=False)
    # What its tokens join to is not the prompt if the tokenizer loses some of it.
    is_joined = request.needs_prompt_tokens and not entry.is_translation
    if request.echo and (is_truncated or is_joined or not isinstance(prompt, str)):
        skip, ids = request.skip_special_tokens, tokens.ids[tokens.eos_prepended :]
        text, incomplete = decode_prompt(tokenizer, ids, skip_special_tokens=skip)
        tokens = tokens._replace(text=text + tokens.trailing_space, incomplete=incomplete)
    length = len(tokens.ids)
    if length > limit:
        message = f"the prompt is {length} tokens long, this server allows {limit}"
        raise ValueError(f"{message}: shorten it by {length - limit}")
    return tokens


def check_token_ids(tokenizer: Tokenizer, ids: Sequence[int], name: str) -> None:
    """Raise a ValueError that names the first id outside the vocabulary."""
    last = tokenizer.vocab_size - 1
    for token in ids:
        if not 0 <= token <= last:
            raise ValueError(f"{name} has token {token}, the model knows 0 to {last}")


TokenInfo = dict[str, Any]
"""A token's entries in OpenAI's four logprobs lists, and its `id`; None for the EOS that ended a choice."""


@dataclasses.dataclass
class Choice:
    """The state of one choice of a response."""

    index: int
    detokenizer: IncrementalDetokenizer
    prompt: PromptTokens
    started: bool = False
    num_tokens: int = 0
    finish_reason: str | None = None
    buffered_tokens: list[TokenInfo] = dataclasses.field(default_factory=list)
    """Tokens whose text the detokenizer has not emitted yet."""


@dataclasses.dataclass
class ChoiceDelta:
    """What one chunk adds to a choice."""

    choice: Choice
    text: str = ""
    tokens: list[TokenInfo] = dataclasses.field(default_factory=list)
    is_first: bool = False
    """Whether this is the first delta of its choice."""

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens that are part of the text."""
        return [token["id"] for token in self.tokens if token["id"] is not None]


class CompletionStream:
    """The response to one completion request; its sequences are generated until `close`.

    Raises what `AsyncEngine.add_requests` raises.
    """

    def __init__(
        self, entry: ModelEntry, request: CompletionRequest, prompts: Sequence[PromptTokens]
    ) -> None:
        self.entry, self.request = entry, request
        self.choices: dict[tuple[Request, int], Choice] = {}
        self.prompt_logprobs: dict[Request, Sequence[TokenLogprobs]] = {}
        self.needs_tokens = request.logprobs is not None or request.return_token_ids
        with bad_request("stop_token_ids"):
            check_token_ids(entry.tokenizer, request.stop_token_ids, "stop_token_ids")
        stop_tokens = {*request.stop_token_ids}
        if not request.ignore_eos:
            stop_tokens.add(entry.tokenizer.eos_token)
        engine_requests = []
        for prompt in prompts:
            # A seed for each prompt: equal prompts without a seed get different outputs.
            engine_request = Request(
                prompt.ids,
                request.max_tokens,
                request.sampling_params(random.getrandbits(63)),
                stop_tokens,
                request.n,
                prompt.allowed_first_tokens,
                decoder_start_token=entry.decoder_start_token,
                num_beams=request.num_beams,
                logprobs=request.logprobs,
                prompt_logprobs=request.echo and request.logprobs is not None,
            )
            engine_requests.append(engine_request)
            for number in range(request.n):
                self.choices[engine_request, number] = Choice(
                    len(self.choices),
                    IncrementalDetokenizer(
                        entry.tokenizer,
                        request.stop,
                        prompt.trailing_space,
                        prompt=prompt.ids,
                        incomplete=prompt.incomplete,
                        min_tokens=request.min_tokens,
                        skip_special_tokens=request.skip_special_tokens,
                    ),
                    prompt,
                )
        self.outputs = entry.engine.add_requests(engine_requests)
        self.head = {
            "id": f"cmpl-{SERVER_ID}-{next(COMPLETION_NUMBERS)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": entry.name,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Token counts; the EOS before a prompt counts, the EOS that ends a choice does not."""
        return self._usage(self.choices.values())

    def _usage(self, choices: Collection[Choice]) -> dict[str, int]:
        """Return the token counts of some choices; those of one prompt share it."""
        prompts = {id(choice.prompt): len(choice.prompt.ids) for choice in choices}
        num_prompt_tokens = sum(prompts.values())
        num_completion_tokens = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
        }

    def close(self) -> None:
        """Abort the sequences that have not finished."""
        self.entry.engine.abort_stream(self.outputs)

    async def deltas(self) -> AsyncGenerator[list[ChoiceDelta]]:
        """Yield what each batch of engine outputs adds to the choices.

        Raises:
            UnavailableError: The engine has failed or is shutting down.
            APIError: The model has failed on this request.
        """
        async for outputs in self.outputs:
            deltas: dict[int, ChoiceDelta] = {}
            error: str | None = None
            for output in outputs:
                choice = self.choices[output.request, output.choice]
                if choice.finish_reason:  # by a stop string, while the engine was in a step
                    continue
                if output.finish_reason == "error":
                    error = output.error
                    break
                delta = deltas.setdefault(choice.index, ChoiceDelta(choice))
                self._add_output(delta, output)
                if choice.detokenizer.stopped:
                    self.entry.engine.abort(output.request, output.choice)
            with_ids = self.request.return_token_ids
            yield [
                d
                for d in deltas.values()
                if d.text or d.tokens or d.choice.finish_reason or (with_ids and d.is_first)
            ]
            if error is not None:
                if not self.entry.engine.is_ready:
                    raise UnavailableError(error)
                logger.error("a request has failed: %s", error)
                raise APIError(500, "the model failed on this request")

    def _add_output(self, delta: ChoiceDelta, output: SequenceOutput) -> None:
        """Add an engine output to the delta of its choice."""
        choice = delta.choice
        echoed_text = choice.prompt.text if self.request.echo else ""
        offset = len(echoed_text)
        if not choice.started:
            choice.started = delta.is_first = True
            delta.text += echoed_text
            if output.prompt_logprobs:  # with the first output of the first choice
                self.prompt_logprobs[output.request] = output.prompt_logprobs
            if self.request.echo and self.needs_tokens:
                logprobs = self.prompt_logprobs.get(output.request, ())
                delta.tokens += self._prompt_tokens(choice.prompt, logprobs)
        if output.token is None:  # a stop token follows the whole text
            delta.text += choice.detokenizer.flush()
        start, is_first = choice.detokenizer.num_decoded, choice.detokenizer.is_first
        if output.token is not None:
            choice.num_tokens += 1
            delta.text += choice.detokenizer.push(output.token)
        token = output.logprobs.token if output.logprobs else output.token
        if token is not None and self.needs_tokens:
            span = offset + start, offset + choice.detokenizer.num_decoded
            in_text = output.token is not None
            info = self._token_info(token, output.logprobs, span, is_first, in_text)
            choice.buffered_tokens.append({**info, "id": output.token})
        if output.finish_reason:
            delta.text += choice.detokenizer.flush()
        choice.finish_reason = "stop" if choice.detokenizer.stopped else output.finish_reason
        emitted = offset + choice.detokenizer.num_emitted
        flush_all = choice.finish_reason and not choice.detokenizer.stopped
        special_tokens = self.entry.tokenizer.special_tokens
        hidden_tokens = special_tokens if self.request.skip_special_tokens else {}
        buffered = choice.buffered_tokens
        while buffered:
            # A token without text can be emitted together with the text before it.
            has_text = buffered[0]["id"] not in hidden_tokens
            if not flush_all and buffered[0]["text_offset"] + has_text > emitted:
                break
            delta.tokens.append(buffered.pop(0))

    def _prompt_tokens(
        self, prompt: PromptTokens, prompt_logprobs: Sequence[TokenLogprobs]
    ) -> list[TokenInfo]:
        """Return the prompt's tokens, without a prepended EOS.

        The first token, which nothing predicts, has no logprob; without `prompt_logprobs`, none has.
        """
        infos, start = [], 0
        stream = TextStream(self.entry.tokenizer, self.request.skip_special_tokens)
        tokens = itertools.zip_longest(prompt.ids, (None, *prompt_logprobs))
        for token, logprobs in itertools.islice(tokens, prompt.eos_prepended, None):
            is_first = stream.is_first
            end = start + len(stream.push(token))
            infos.append(self._token_info(token, logprobs, (start, end), is_first))
            start = end
        return infos

    def _token_info(
        self,
        token: int,
        logprobs: TokenLogprobs | None,
        span: tuple[int, int],
        is_first: bool,
        in_text: bool = True,
    ) -> TokenInfo:
        """Return a token's info; `span` has the lengths of the decoded text before and after it.

        `is_first` tells whether it starts the text. A stop token that ended a choice is not `in_text`.
        """
        tokenizer, (start, end) = self.entry.tokenizer, span
        text_of = functools.partial(token_text, tokenizer, is_first=is_first)
        text = text_of(token)
        # A token of whole characters ends the text, after those of the bytes pending before it.
        if token in tokenizer.special_tokens:
            is_whole = in_text and not self.request.skip_special_tokens
        else:
            data = tokenizer.token_bytes(token, is_first=is_first)
            is_whole = in_text and data == text.encode()
        top_logprobs = logprobs and {text_of(t): p for t, p in logprobs.top_logprobs}
        return {
            "id": token,
            "tokens": text,
            "token_logprobs": logprobs and logprobs.logprob,
            "top_logprobs": top_logprobs,
            "text_offset": max(0, end - len(text)) if is_whole else start,
        }

    def _choice_fields(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Return one of the `choices` of a chunk or response."""
        choice, logprobs = delta.choice, None
        if self.request.logprobs is not None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [token[name] for token in delta.tokens] for name in names}
        content = {"index": choice.index, "text": delta.text, "logprobs": logprobs}
        content["finish_reason"] = choice.finish_reason
        if self.request.return_token_ids:
            content["token_ids"] = delta.token_ids
            if delta.is_first:
                content["prompt_token_ids"] = choice.prompt.ids
        return content

    async def response(self) -> bytes:
        """Return the JSON of a response that is not streamed."""
        totals = [ChoiceDelta(choice, is_first=True) for choice in self.choices.values()]
        async with contextlib.aclosing(self.deltas()) as batches:
            async for deltas in batches:
                for delta in deltas:
                    totals[delta.choice.index].text += delta.text
                    totals[delta.choice.index].tokens += delta.tokens
        choices = [self._choice_fields(delta) for delta in totals]
        return to_json({**self.head, "choices": choices, "usage": self.usage})

    async def events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error is an event too; `data: [DONE]` always ends the stream."""
        options = self.request.stream_options or StreamOptions()
        include_usage = options.include_usage
        # All chunks share their beginning and end: encode these once.
        head = b"data: " + to_json(self.head)[:-1] + b',"choices":['
        end = b'],"usage":null}' if include_usage else b"]}"
        events = b""

        def event(choices: bytes, end: bytes) -> bytes:
            if options.include_obfuscation:
                end = end[:-1] + b',"obfuscation":""}'
                length = -len(head + choices + end) % OBFUSCATION_SIZE
                padding = secrets.token_urlsafe(length)[:length].encode()
                end = end[:-2] + padding + b'"}'
            return head + choices + end + b"\n\n"

        try:
            async with contextlib.aclosing(self.deltas()) as batches:
                async for deltas in batches:
                    for delta in deltas:
                        if options.continuous_usage_stats:
                            usage = self._usage([delta.choice])
                            end = b'],"usage":' + to_json(usage) + b"}"
                        events += event(to_json(self._choice_fields(delta)), end)
                    if events and self.outputs.unfinished:  # the last are sent with [DONE]
                        yield events
                        events = b""
            if include_usage:
                events += event(b"", b'],"usage":' + to_json(self.usage) + b"}")
        except (APIError, UnavailableError) as error:
            events += b"data: " + to_api_error(error).body() + b"\n\n"
        yield events + b"data: [DONE]\n\n"


class EventStreamResponse(StreamingResponse):
    """A completion as server-sent events; its sequences are aborted when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, completion: CompletionStream) -> None:
        super().__init__(completion.events(), headers={"cache-control": "no-cache"})
        self.completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the last one or a disconnect, which may precede the first."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.completion.close()

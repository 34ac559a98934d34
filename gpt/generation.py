"""Generate one sequence. `generate` is the reference that the serving engine is tested against."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from gpt.models.base import LanguageModel, State
from gpt.sampling import NAN_LOGITS, Sampler, SamplingParams, mask_logits


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    params: SamplingParams,
    stop: Collection[int] = (),
    choice: int = 0,
    allowed_first_tokens: Sequence[int] = (),
    decoder_start_token: int | None = None,
) -> Iterator[int]:
    """Generate the tokens that follow `prompt`, one at a time.

    Generation ends after `max_tokens`, when the model's context is full, or at a token in `stop`.
    A prompt that is empty, too long, or has a token outside the vocabulary is a ValueError.

    Args:
        model: A model in evaluation mode.
        prompt: Tokens as the model saw them in training, where each document starts with the EOS
            token of the one before.
        max_tokens: Most tokens to generate.
        params: How tokens are chosen.
        stop: Tokens that end the output; they are not part of it.
        choice: Number of this output among those of one seed.
        allowed_first_tokens: If there are any, the output starts with one of them.
        decoder_start_token: If not None, the prompt is a source sentence, and this token starts
            its translation.
    """
    # Checked at the call; a generator would check at its first token.
    max_tokens = clamp_max_tokens(model, prompt, max_tokens, model.max_length, decoder_start_token)
    output: list[int] = []

    def mask(logits_1V: Tensor) -> Tensor:
        return mask_logits(logits_1V, () if output else allowed_first_tokens)

    def recompute(_: int) -> Tensor:
        logits_V = recompute_logits(model, prompt, output, decoder_start_token)
        return mask(logits_V.unsqueeze(0))[0]

    @torch.inference_mode()
    def tokens() -> Iterator[int]:
        if max_tokens == 0:
            return
        device = next(model.parameters()).device
        sampler = Sampler(1, model.vocab_size, device)
        sampler.add_sequence(0, params, prompt, choice, stop_tokens=stop)
        prompt_1T = torch.tensor([list(prompt)], device=device)
        length = len(prompt) + max_tokens - 1
        state, features_1D = prefill(model, prompt_1T, length, decoder_start_token)
        while True:
            token = int(sampler(mask(model.logits(features_1D)), recompute=recompute))
            if token < 0:
                raise ValueError(NAN_LOGITS)
            if token in stop:
                return
            yield token
            output.append(token)
            if len(output) == max_tokens:
                return
            length = len(prompt) + len(output) + (decoder_start_token is not None)
            token_11 = prompt_1T.new_full((1, 1), token)
            features_1D = model.features(token_11, model.prefix_view(state, length))[:, -1]

    return tokens()


def prefill(
    model: LanguageModel, prompt_1T: Tensor, length: int, decoder_start_token: int | None = None
) -> tuple[State, Tensor]:
    """Run the model over a prompt: return its state, and features_1D that predict the next token.

    The state has room for `length` tokens. With a `decoder_start_token` the prompt is a source
    sentence, and this token starts its translation.
    """
    if decoder_start_token is None:
        state = model.init_state(1, length)
        return state, model.prefill(prompt_1T, model.prefix_view(state, prompt_1T.shape[1]))
    state = model.init_state(1, model.context_length)
    encoded = model.encode_source(prompt_1T, prompt_1T.new_full((1,), prompt_1T.shape[1]))
    for name, tensor in encoded.items():  # only as long as the source; `state` has room for more
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    start_11 = prompt_1T.new_full((1, 1), decoder_start_token)
    return state, model.features(start_11, model.prefix_view(state, prompt_1T.shape[1] + 1))[:, -1]


def recompute_logits(
    model: LanguageModel,
    prompt: Sequence[int],
    output: Sequence[int],
    decoder_start_token: int | None = None,
) -> Tensor:
    """Return logits_V of the token after `prompt` and `output`, from scratch in a batch of one."""
    prompt_1T = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    length = len(prompt) + len(output)
    state, features_1D = prefill(model, prompt_1T, length, decoder_start_token)
    if output:
        output_1T = prompt_1T.new_tensor([list(output)])
        features_1D = model.features(output_1T, model.prefix_view(state, length + 1))[:, -1]
    return model.logits(features_1D)[0]


def clamp_max_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    max_length: int | None,
    decoder_start_token: int | None = None,
) -> int:
    """Return how many tokens can follow `prompt` in `max_length` positions, at most `max_tokens`.

    The last token is predicted but never fed back: it takes no position. With a
    `decoder_start_token`, the prompt is a source sentence, and the model limits its translation.
    A prompt that is empty, too long, or has a token outside the vocabulary is a ValueError.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, not {max_tokens}")
    if not len(prompt):
        raise ValueError("the prompt is empty: expected at least one token")
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        unknown = next(token for token in prompt if not 0 <= token < model.vocab_size)
        raise ValueError(
            f"the prompt has token {unknown}, the model knows 0 to {model.vocab_size - 1}"
        )
    if decoder_start_token is not None:
        room = model.max_target_length(len(prompt))
        if len(prompt) > model.context_length or (room is not None and room < 1):
            raise ValueError(
                f"the source sentence is {len(prompt)} tokens long: the model's context of "
                f"{model.context_length} has no room for it and a translation"
            )
        if room is None:
            return max_tokens
        if max_length is not None and model.max_length is not None:
            room -= model.max_length - max_length
        return max(0, min(max_tokens, room))
    if max_length is None:
        return max_tokens
    if len(prompt) > max_length:
        raise ValueError(
            f"the prompt is {len(prompt)} tokens long, the model's context holds {max_length}: "
            f"shorten it by {len(prompt) - max_length}"
        )
    return min(max_tokens, max_length - len(prompt) + 1)

"""The engine, `transformers` and llama.cpp behind one interface, all with the weights of one GPT-2.

A backend's `generate(prompts, max_tokens)` returns the greedy output of each prompt, as token ids.
No token ends a sequence, so all backends do the same work. A backend runs on its model's device.
"""

import ctypes
import dataclasses
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt import interchange
from gpt.gguf import save_gguf, to_gguf
from gpt.kernels.quantization import DType, quantize
from gpt.models.gpt import GPT2
from gpt.sampling import SamplingParams
from serving.engine.autotune import tune_scheduler_steps
from serving.engine.compilation import Compiler
from serving.engine.engine import MAX_NUM_BATCHED_TOKENS, Engine
from serving.engine.sequence import Request

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The shape of an untrained GPT-2."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    context_length: int = 1024

    def build(self) -> GPT2:
        """Return the model; its weights are the same every time."""
        torch.manual_seed(0)
        return GPT2(**dataclasses.asdict(self)).eval()


SIZES = {
    "1M": ModelSize(1024, 128, 4, 4),
    "10M": ModelSize(4096, 320, 7, 5),
    "124M": ModelSize(50_257, 768, 12, 12),
}
"""By their approximate number of parameters."""


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Return prompts of random tokens, the same every time."""
    rng = random.Random(length)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


class TinyGPT:
    """The engine of `serving`, in this process, with compiled steps on a CPU, CUDA graphs on a GPU."""

    def __init__(
        self,
        model: GPT2,
        max_num_seqs: int,
        dtype: DType,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    ) -> None:
        self.engine = Engine(
            quantize(model, dtype),
            max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_scheduler_steps=tune_scheduler_steps(model),
            cuda_graphs=next(model.parameters()).device.type == "cuda",
        )
        compiler = Compiler()
        compiler.add(self.engine, torch.get_num_threads())
        compiler.wait()

    def generate(self, prompts: Prompts, max_tokens: int) -> list[list[int]]:
        """Return the greedy output of each prompt."""
        greedy = SamplingParams(temperature=0)
        outputs: dict[Request, list[int]] = {}
        for prompt in prompts:
            request = Request(prompt, max_tokens, greedy)
            outputs[request] = []
            self.engine.add_request(request)
        while not self.engine.is_idle:
            for output in self.engine.step():
                assert output.token is not None, output.error
                outputs[output.request].append(output.token)
        return list(outputs.values())


class Transformers:
    """`generate` of `transformers`, with a static batch; equal prompt lengths need no padding."""

    def __init__(self, model: GPT2) -> None:
        self.model = to_transformers(model)

    @torch.inference_mode()
    def generate(self, prompts: Prompts, max_tokens: int) -> list[list[int]]:
        """Return the greedy output of each prompt."""
        prompts_BT = torch.tensor([list(prompt) for prompt in prompts], device=self.model.device)
        sequences_BT = self.model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            do_sample=False,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            pad_token_id=0,
        )
        return sequences_BT[:, prompts_BT.shape[1] :].tolist()


class LlamaCpp:
    """llama.cpp through the low-level API of `llama-cpp-python`.

    Args:
        model: Its weights are passed in a GGUF file.
        dtype: Of its matrices: float32, float16, q8_0.
        threads: Number of llama.cpp's threads.
        max_num_seqs: The most prompts of one `generate`.
    """

    def __init__(self, model: GPT2, dtype: str, threads: int, max_num_seqs: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.vocab_size = model.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            save_gguf(path, to_gguf(model, dtype, {"tokenizer.ggml.model": "no_vocab"}))
            self.api.llama_log_set(_discard_log, ctypes.c_void_p(0))
            self.api.llama_backend_init()
            model_params = self.api.llama_model_default_params()
            model_params.use_mmap = False  # the file is deleted below
            self.model = self.api.llama_model_load_from_file(str(path).encode(), model_params)
        params = self.api.llama_context_default_params()
        params.n_ctx = model.context_length * max_num_seqs
        params.n_seq_max = max_num_seqs
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, params)
        self.batch = self.api.llama_batch_init(512, 0, 1)

    def generate(self, prompts: Prompts, max_tokens: int) -> list[list[int]]:
        """Return the greedy output of each prompt."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        outputs: list[list[int]] = []
        for sequence, prompt in enumerate(prompts):
            self._decode([(token, position, sequence) for position, token in enumerate(prompt)])
            outputs.append([self._argmax(len(prompt) - 1)])
        for position in range(len(prompts[0]), len(prompts[0]) + max_tokens - 1):
            self._decode([(tokens[-1], position, i) for i, tokens in enumerate(outputs)])
            for i, tokens in enumerate(outputs):
                tokens.append(self._argmax(i))
        return outputs

    def _decode(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Run one batch of (token, position, sequence); compute the logits of each sequence's last entry."""
        batch = self.batch
        batch.n_tokens = len(entries)
        one_sequence = len({sequence for _, _, sequence in entries}) < len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = not one_sequence or i == len(entries) - 1
        if self.api.llama_decode(self.context, batch):
            raise ValueError("llama.cpp could not decode")

    def _argmax(self, entry: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, entry)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


_discard_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None  # noqa: ARG005
)


# Weights.


def to_transformers(model: GPT2, **config_args: Any) -> Any:  # noqa: ANN401 (a GPT2LMHeadModel)
    """Return the same model as a `GPT2LMHeadModel`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config, tensors = interchange.to_transformers(model)
    ids = {"bos_token_id": None, "eos_token_id": None}
    hf_model: Any = GPT2LMHeadModel(GPT2Config(**{**config, **ids, **config_args}))
    hf_model.to(model.embedding.weight)  # its device and dtype
    embedding = tensors["transformer.wte.weight"]
    hf_model.load_state_dict({**tensors, "lm_head.weight": embedding})
    return hf_model.train(model.training)

"""Other libraries that make text, on the weights of our GPT-2: each asked to do three things.

A rival has `one`, a text alone; `many`, several at once; and `prompt`, a prompt read and one
token made. All are greedy, of ids, and end for nothing: what is compared is the same work.
"""

import ctypes
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt.kernels.quantization import DType, quantize
from gpt.models.gpt import GPT2
from gpt.sampling import SamplingParams
from serving.engine.autotune import tune_scheduler_steps
from serving.engine.compilation import Compiler
from serving.engine.engine import Engine
from serving.engine.sequence import Request

Prompts = Sequence[Sequence[int]]


def weights_of(model: GPT2) -> dict[str, Any]:
    """GPT-2's weights by OpenAI's names, matrices as they multiply from the left; a bias that it has not is 0."""
    ours = model.state_dict()
    for name, tensor in model.state_dict().items():
        ours.setdefault(name.replace("weight", "bias"), tensor.new_zeros(len(tensor)))
    found = {"wte": ours["embedding.weight"], "wpe": ours["position.weight"]}
    names = {
        "attention_norm": "ln_1",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        found[f"ln_f.{kind}"] = ours[f"norm.{kind}"]
        for layer in range(model.depth):
            block = f"blocks.{layer}"
            for name, theirs in names.items():
                found[f"h.{layer}.{theirs}.{kind}"] = ours[f"{block}.{name}.{kind}"]
            parts = [ours[f"{block}.attention.{one}.{kind}"] for one in ("query", "key", "value")]
            found[f"h.{layer}.attn.c_attn.{kind}"] = torch.cat(parts)
    return found


class Ours:
    """The engine, in this process."""

    def __init__(self, model: GPT2, rows: int, dtype: DType) -> None:
        self.engine = Engine(
            quantize(model, dtype), rows, num_scheduler_steps=tune_scheduler_steps(model)
        )
        compiler = Compiler()
        compiler.add(self.engine, torch.get_num_threads())
        compiler.wait()

    def many(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        """The tokens of each text."""
        requests = [Request(prompt, tokens, SamplingParams(temperature=0)) for prompt in prompts]
        texts: dict[Request, list[int]] = {request: [] for request in requests}
        for request in requests:
            self.engine.add_request(request)
        while not self.engine.is_idle:
            for event in self.engine.step():
                assert event.token is not None, event.error
                texts[event.request].append(event.token)
        return list(texts.values())


def as_transformers(model: GPT2, **settings: Any) -> Any:  # noqa: ANN401 (theirs)
    """The same model as `transformers` has it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.context_length,
        n_embd=model.width,
        n_layer=model.depth,
        n_head=model.heads,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    theirs: Any = GPT2LMHeadModel(config)
    theirs.to(model.embedding.weight.dtype)
    state = {
        f"transformer.{name}.weight" if name in ("wte", "wpe") else f"transformer.{name}": (
            tensor.T if tensor.ndim == 2 and name.startswith("h.") else tensor
        )
        for name, tensor in weights_of(model).items()
    }
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    return theirs.train(model.training)


class Transformers:
    """`transformers`' generate: all prompts of one length, so that none is padded."""

    def __init__(self, model: GPT2) -> None:
        self.model = as_transformers(model)

    @torch.inference_mode()
    def many(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        """The tokens of each text."""
        ids_BT = torch.tensor([list(prompt) for prompt in prompts])
        made_BT = self.model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
        return made_BT[:, ids_BT.shape[1] :].tolist()


class LlamaCpp:
    """llama.cpp through `llama-cpp-python`, its lower half: a batch of tokens at a time.

    Args:
        model: Whose weights it gets, through a GGUF file.
        kind: Of its matrices: F32, F16, Q8_0.
        threads: Of its own.
        rows: Most texts at once.
    """

    def __init__(self, model: GPT2, kind: str, threads: int, rows: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.vocabulary, self.rows = model.vocab_size, rows
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            self.api.llama_log_set(_silence, ctypes.c_void_p(0))
            self.api.llama_backend_init()
            options = self.api.llama_model_default_params()
            options.use_mmap = False  # the file is about to go
            self.model = self.api.llama_model_load_from_file(str(path).encode(), options)
        settings = self.api.llama_context_default_params()
        settings.n_ctx = model.context_length * rows
        settings.n_seq_max = rows
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, settings)
        self.batch = self.api.llama_batch_init(512, 0, 1)

    def many(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        """The tokens of each text."""
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_clear(memory, True)
        texts: list[list[int]] = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            places = self._decode([(token, place, row) for place, token in enumerate(prompt)])
            texts[row].append(self._best(places[-1]))
        length = len(prompts[0])
        for step in range(tokens - 1):
            self._decode([(text[-1], length + step, row) for row, text in enumerate(texts)])
            for row, text in enumerate(texts):
                text.append(self._best(row))
        return texts

    def _decode(self, entries: Sequence[tuple[int, int, int]]) -> range:
        """Take in tokens (token, position, row); the numbers under which their logits are."""
        batch = self.batch
        batch.n_tokens = len(entries)
        rows = {row for _, _, row in entries}
        for number, (token, place, row) in enumerate(entries):
            batch.token[number], batch.pos[number] = token, place
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            batch.logits[number] = len(rows) == len(entries) or number == len(entries) - 1
        if self.api.llama_decode(self.context, batch):
            raise ValueError("llama.cpp could not decode")
        return range(len(entries))

    def _best(self, number: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, number)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


_silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None  # noqa: ARG005
)
"""What llama.cpp says, it says to nobody."""


def write_gguf(model: GPT2, path: Path, kind: str) -> None:
    """Write a GPT-2 as llama.cpp reads it; vectors and positions stay in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(len(weights_of(model)["h.0.mlp.c_fc.weight"]))
    writer.add_block_count(model.depth)
    writer.add_head_count(model.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(model.vocab_size)
    names = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    names |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    wanted = gguf.GGMLQuantizationType[kind]
    for name, tensor in weights_of(model).items():
        if name in ("wte", "wpe"):
            theirs = {"wte": "token_embd.weight", "wpe": "position_embd.weight"}[name]
        elif name.startswith("ln_f"):
            theirs = name.replace("ln_f", "output_norm")
        else:
            _, layer, rest = name.split(".", 2)
            part, _, what = rest.rpartition(".")
            theirs = f"blk.{layer}.{names[part]}.{what}"
        values = tensor.detach().numpy().astype(np.float32)
        matrix = values.ndim == 2 and name != "wpe"
        own = wanted if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT-2 of some size, with weights that nobody has trained."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    context: int = 1024

    def build(self) -> GPT2:
        """The model; the same every time."""
        torch.manual_seed(0)
        model = GPT2(
            self.vocabulary, self.context, width=self.width, depth=self.depth, heads=self.heads
        )
        return model.eval()


SIZES = {
    "1M": Size(1024, 128, 4, 4),
    "10M": Size(4096, 320, 7, 5),
    "124M": Size(50_257, 768, 12, 12),
}
"""By about how many parameters they have."""

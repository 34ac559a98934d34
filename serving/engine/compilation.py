"""Compile an engine's steps for this machine, in the background, with AOTInductor.

An engine first runs its model eagerly. Meanwhile a process of its own, at low priority, traces
each kind of step, with any number of rows and positions, and compiles the C++ code that
TorchInductor generates for it (Ansel et al. 2024, "PyTorch 2"). That code has no weights: it
uses those of the engine's model, is compared with it once, and then replaces the eager step. It
is kept in the user's cache, in a file named after all that it depends on, so that the next server
starts with it.
"""

import contextlib
import copy
import functools
import hashlib
import logging
import os
import pickle
import platform
import queue
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from gpt.checkpoint import cache_dir
from gpt.device import cpu_info
from gpt.kernels.quantization import is_int_mm_exact
from gpt.models.base import LanguageModel, batch_slice
from gpt.sampling import RANDOM_STATE, Sampler, SamplingParams
from serving.engine.autotune import run_in_own_thread
from serving.engine.compiled_step import CompiledStep
from serving.engine.cpu_kernels import HEADERS, inductor_config, substitute_attention
from serving.engine.engine import Engine
from serving.engine.steps import StepKind, eager_step

logger = logging.getLogger(__name__)

MIN_CACHE_LENGTH = 16
"""Below it, compiling gains nothing, and example inputs differ too little to show what is dynamic."""
MAX_INLINED_NUMEL = 8
"""TorchInductor turns tensors of up to this many elements into constants of the generated code."""
TOLERANCE = 0.02
"""Largest error of a compiled step, as a share of the largest logit: what rounding to 8 bits causes."""


def find_cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch would use, or None."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


# Trace and compile.


def example_inputs(model: LanguageModel, length: int, kind: StepKind) -> list[tuple[Any, ...]]:
    """Return two inputs as an engine passes them, which differ in every size that is dynamic."""
    max_rows = 3 if kind == "decode" else 1
    state = model.init_state(max_rows, length)
    sampler = Sampler(max_rows, model.vocab_size)
    for row in range(max_rows):
        sampler.add_sequence(row, SamplingParams(seed=row), ())
    examples: list[tuple[Any, ...]] = []
    for extra in (0, 1):
        rows = 2 + extra if kind == "decode" else 1
        tokens_BT = torch.zeros(rows, 2 + extra if kind == "prefill" else 1, dtype=torch.long)
        inputs = tokens_BT, model.prefix_view(batch_slice(state, 0, rows), length // 2 + extra)
        random_state = {name: sampler.state[name][:rows] for name in RANDOM_STATE}
        examples.append(inputs if kind == "prefill" else (*inputs, random_state))
    return examples


TRANSPOSED_ROWS = (9, 48)
"""Fewest and most rows for which MKL multiplies float32 matrices faster with the weight on the left:
by a third on one thread, twofold on two."""


class TransposedLinear(TorchFunctionMode):
    """Lets `F.linear` choose the order of its factors by the number of rows, when the code runs."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,  # noqa: ANN401 (as torch passes them)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call the function, or its replacement."""
        function = _linear if function is F.linear and not kwargs else function
        return function(*args, **(kwargs or {}))


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    x_NI = x.reshape(-1, x.shape[-1])
    rows = x_NI.shape[0]
    if isinstance(rows, int) or x.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return F.linear(x, weight_OI, bias_O)

    def transposed(x_NI: Tensor, weight_OI: Tensor, *bias_O: Tensor) -> tuple[Tensor]:
        return (sum(bias_O, (weight_OI @ x_NI.t()).t()).contiguous(),)

    def plain(x_NI: Tensor, weight_OI: Tensor, *bias_O: Tensor) -> tuple[Tensor]:
        return (F.linear(x_NI, weight_OI, *bias_O),)

    fewest, most = TRANSPOSED_ROWS
    # The operator itself: `torch.cond` goes through Dynamo, which may specialize the number of rows.
    (y_NO,) = torch.ops.higher_order.cond(
        (rows - fewest) * (most - rows) >= 0,  # TorchInductor does not support `and` here
        transposed,
        plain,
        (x_NI, weight_OI) if bias_O is None else (x_NI, weight_OI, bias_O),
    )
    return y_NO.view(*x.shape[:-1], -1)


def trace_step(model: LanguageModel, length: int, kind: StepKind) -> torch.export.ExportedProgram:
    """Trace a step of a model whose states have `length` positions; weights do not matter."""
    example, other_example = example_inputs(model, length, kind)

    def dynamic_axes(tensor: Tensor, other: Tensor) -> dict[int, Any]:
        sizes = enumerate(zip(tensor.shape, other.shape, strict=True))
        return {axis: torch.export.Dim.DYNAMIC for axis, (a, b) in sizes if a != b}

    dynamic_shapes = tree_map(dynamic_axes, example, other_example)
    step = eager_step(model, kind)
    with torch.no_grad(), TransposedLinear():
        return torch.export.export(step, example, dynamic_shapes=dynamic_shapes, strict=False)


def compile_step(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile a traced step to a file of machine code without weights."""
    substitute_attention(program)
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={
            "aot_inductor.package_constants_in_so": False,
            **inductor_config(torch.get_num_threads()),
        },
    )


# In the background.


def is_private(folder: Path) -> bool:
    """Return whether a folder is this user's, and no one else can write to it."""
    status = folder.stat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class CompileJob:
    """A step to be compiled for an engine, and the cache file that equal jobs share."""

    def __init__(self, engine: Engine, kind: StepKind, num_threads: int, folder: Path) -> None:
        self.engine, self.kind = engine, kind
        # As lists: tensors of the same contents are not always pickled to the same bytes.
        inlined = [tensor.tolist() for tensor in _inlined_tensors(engine.model)]
        skeleton = _without_weights(engine.model)
        self.payload = pickle.dumps((skeleton, inlined, engine.cache_length, kind, num_threads))
        """What the compiling process reads."""
        root = Path(__file__).parents[2]
        sources = sorted([*root.glob("gpt/**/*.py"), *root.glob("serving/engine/*.py"), *HEADERS])
        # Its OpenMP workers would outlive the probe on this thread, and keep libgomp from spinning.
        is_exact = run_in_own_thread(is_int_mm_exact)
        environment = (torch.__version__, platform.system(), cpu_info(), is_exact)
        parts = [self.payload, repr(environment).encode()]
        parts += [source.read_bytes() for source in sources]
        digest = hashlib.sha256(b"|".join(parts)).hexdigest()
        self.path = folder / f"{digest[:24]}.pt2"

    def load(self) -> CompiledStep:
        """Load the compiled step; a ValueError says that it computes something else than the model."""
        eager = eager_step(self.engine.model, self.kind)
        compiled = CompiledStep(self.path, eager)
        outputs = []
        with torch.inference_mode():
            for step in (eager, compiled):
                inputs = example_inputs(self.engine.model, self.engine.cache_length, self.kind)[0]
                outputs.append([step(*inputs)[0].float() for _ in range(2)][1])
        expected, actual = outputs
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if not error <= TOLERANCE:
            raise ValueError(f"its output differs from the model's by {error:.1%}")
        return compiled


def _inlined_tensors(model: LanguageModel) -> list[Tensor]:
    """Return the tensors whose contents become a part of the compiled code."""
    tensors = (*model.parameters(), *model.buffers())
    return [tensor for tensor in tensors if tensor.numel() <= MAX_INLINED_NUMEL]


def _without_weights(model: LanguageModel) -> LanguageModel:
    """Return a copy of the model with its tensors on the meta device."""

    def to_meta(tensor: Tensor) -> Tensor:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty

    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): to_meta(tensor) for tensor in tensors})


class Compiler:
    """Compiles steps of engines in the background, one job after the other."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Engine, StepKind, int] | None] = queue.Queue()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._temporary = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run_jobs, name="compiler", daemon=True)
        self._thread.start()

    def add(self, engine: Engine, num_threads: int) -> None:
        """Replace an engine's steps by compiled ones for `num_threads` threads, once these are ready.

        Nothing is compiled off the CPU, without a C++ compiler, for a short context, or for a
        deterministic engine, whose output would change with the step.
        """
        if (
            engine.device.type != "cpu"
            or engine.cache_length < MIN_CACHE_LENGTH
            or engine.deterministic
            or not find_cpp_compiler()
        ):
            return
        kinds: list[StepKind] = ["decode_one"]
        kinds += ["prefill"] if engine.model.supports_chunked_prefill else []
        kinds += ["decode"] if engine.max_num_seqs > 1 else []
        for kind in kinds:
            self._jobs.put((engine, kind, num_threads))

    def wait(self) -> None:
        """Wait until all jobs are done."""
        self._jobs.join()

    def close(self) -> None:
        """Stop, also in the middle of a job.

        The thread is joined: if the process ended while it runs C++ code, that would abort.
        """
        self._closed = True
        self._jobs.put(None)
        if self._process:
            self._process.terminate()
        self._thread.join()
        self._temporary.close()

    @functools.cached_property
    def _folder(self) -> Path:
        """The folder of compiled steps: the cache, or a temporary one if others can write to that."""
        folder = cache_dir() / "steps"
        try:
            folder.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            if not is_private(folder):
                logger.warning(
                    "%s belongs to another user, or others can write to it: the server would run "
                    "their code, so it compiles anew; chmod go-w keeps others out",
                    folder,
                )
                temporary = tempfile.TemporaryDirectory(prefix="tinygpt-")
                folder = Path(self._temporary.enter_context(temporary))
        return folder

    def _run_jobs(self) -> None:
        while job := self._jobs.get():
            try:
                if not self._closed:
                    self._replace_step(*job)
            except Exception as error:  # such as a full disk; the eager step remains
                logger.warning("the %s step is not compiled: %s", job[1], error)
            self._jobs.task_done()

    def _replace_step(self, engine: Engine, kind: StepKind, num_threads: int) -> None:
        """Replace an engine's step by the compiled one, from the cache if it is there."""
        job = CompileJob(engine, kind, num_threads, self._folder)
        if job.path.exists() or self._compile(job):
            try:
                engine.steps[kind] = run_in_own_thread(job.load)
            except Exception as error:
                job.path.unlink()  # the next server compiles it again
                raise ValueError(f"the compiled code cannot be used: {error}") from error

    def _compile(self, job: CompileJob) -> bool:
        """Compile a step in a process of its own; return False, and log a line, if that fails."""
        temporary = job.path.with_name(f"{os.getpid()}-{job.path.name}")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.engine.compilation", str(temporary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is for the server
        )
        if self._closed:  # since it was checked
            self._process.terminate()
        _, stderr = self._process.communicate(job.payload)
        if self._process.returncode == 0 and temporary.exists():
            temporary.replace(job.path)
            return True
        temporary.unlink(missing_ok=True)
        if not self._closed:
            lines = stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            # A model that processes a prompt token by token cannot be traced: this is expected.
            level = logging.INFO if job.kind == "prefill" else logging.WARNING
            logger.log(level, "the %s step is not compiled: %s", job.kind, lines[-1])
        return False


# In the compiling process.


def _exit_with(parent: int) -> None:
    """End this process when its parent ends, even if that is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Compile a step: a `CompileJob`'s payload from standard input, to the path in the arguments."""
    os.nice(10)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    # Unpickling is safe: the pipe is from the server that started this process, not a file.
    model, inlined, length, kind, num_threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(num_threads)
    model.to_empty(device="cpu")
    for tensor, values in zip(_inlined_tensors(model), inlined, strict=True):
        tensor.copy_(torch.tensor(values))
    compile_step(trace_step(model, length, kind), Path(sys.argv[1]))


if __name__ == "__main__":
    main()

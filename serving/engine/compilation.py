"""Steps compiled for this machine, made in the background and swapped in when they are ready.

An engine answers at once, with its model as it is. Meanwhile a process of its own, at low
priority, traces one step of one row and one of any number of rows, lets TorchInductor
write C++ for them and compiles that (Ansel et al. 2024, "PyTorch 2"); how far the rows
reach stays open. What comes out knows no weights: it is given those of the engine's model,
is compared with it once, and then takes its place. It is kept in the user's cache, under
a name that says what it is for, so that the next server has it from the beginning on.
"""

import copy
import ctypes
import hashlib
import logging
import os
import pickle
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt.checkpoint import cache_dir
from gpt.device import cpu_info
from gpt.models.base import LanguageModel, State, batch_slice
from gpt.sampling import RANDOM_STATE, Sampler, SamplingParams
from serving.engine.attention_kernel import KERNEL, inductor_config, substitute_kernel
from serving.engine.autotune import run_in_own_thread
from serving.engine.engine import Engine, StepKind, eager_step

logger = logging.getLogger(__name__)

SHORTEST = 16
"""Positions below which there is nothing to win, and too little to tell what varies."""
INLINED = 8
"""Numbers in a tensor that TorchInductor takes for constants of the code, whoever else has others there."""
TURNED = (9, 48)
"""Fewest and most rows that float32 matrices take faster from the left, in MKL: by a third on one thread, twofold on two."""
TOLERANCE = 0.02
"""Share of the largest logit by which a compiled step may differ: as much as a rounding to 8 bits may."""


def find_cpp_compiler() -> str | None:
    """The C++ compiler that would be used, if there is one."""
    wanted = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in wanted if name and (path := shutil.which(name))), None)


class CompiledStep:
    """Compiled code from a file, with the weights of a model.

    It is called through its C interface, that of torch's `aoti_runtime/interface.h`: torch's own
    way in keeps Python's lock while the code runs, and a server would answer nobody meanwhile.

    Args:
        path: Made by `compile_part`.
        part: Whose weights it uses; they must stay where they are.
    """

    def __init__(self, path: Path, part: nn.Module) -> None:
        library = _library(path)
        container, count = ctypes.c_void_p(), ctypes.c_size_t()

        def call(name: str, *arguments: Any) -> None:  # noqa: ANN401 (as C takes them)
            _check(library[f"AOTInductorModelContainer{name}"](*arguments))

        def name_of(what: str, number: int) -> bytes:
            name = ctypes.c_char_p()
            call(f"GetConstant{what}", container, ctypes.c_size_t(number), ctypes.byref(name))
            return name.value or b""

        call("CreateWithDevice", ctypes.byref(container), ctypes.c_size_t(1), b"cpu", None)
        call("GetNumConstants", container, ctypes.byref(count))
        tensors = {
            **dict(part.named_parameters(remove_duplicate=False)),
            **dict(part.named_buffers(remove_duplicate=False)),
        }
        numbers = range(count.value)
        # Aliases: what torch keeps of these, it never gives back.
        wanted = [tensors[name_of("OriginalFQN", number).decode()].detach() for number in numbers]
        handles = _handles(wanted)
        names = [name_of("Name", number) for number in numbers]
        pairs = (_Constant * len(names))(*map(_Constant, names, handles))
        no, yes = ctypes.c_bool(False), ctypes.c_bool(True)
        call("UpdateUserManagedConstantBufferPairs", container, pairs, count, no, yes)
        call("GetNumOutputs", container, ctypes.byref(count))
        self._container, self._outputs = container, count.value
        self._run = library.AOTInductorModelContainerRunSingleThreaded
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._run.argtypes = [pointer, pointer, size, pointer, size, pointer, pointer]
        weakref.finalize(self, _release, library, container, handles).atexit = False

    def __call__(self, tokens_BT: Tensor, *states: State) -> Sequence[Tensor]:
        """As of the part."""
        given = _handles([tokens_BT, *(tensor for state in states for tensor in state.values())])
        inputs = (ctypes.c_void_p * len(given))(*given)
        outputs = (ctypes.c_void_p * self._outputs)()
        _check(self._run(self._container, inputs, len(inputs), outputs, len(outputs), None, None))
        return _tensors(outputs)


class _Constant(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _handles(tensors: list[Tensor]) -> list[int]:
    """As compiled code takes tensors: it frees those of its inputs, we those of its constants."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
    return [_pointer_of(capsule, None) for capsule in capsules]


def _tensors(handles: Iterable[int]) -> list[Tensor]:
    """The tensors of handles, which are freed."""
    capsules = [_capsule(handle, None, None) for handle in handles]
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)


def _check(failed: int) -> None:
    if failed:
        raise RuntimeError("compiled code has failed; it has written why to standard error")


def _library(path: Path) -> ctypes.CDLL:
    """What is in a package, loaded: from a file of its own, that may be gone then."""
    with zipfile.ZipFile(path) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".so")]
        code = package.read(name)
    if b"aoti_torch_proxy_executor" in code:
        raise ValueError("it has an operator without a C interface")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.so"
        file.write_bytes(code)
        return ctypes.CDLL(str(file))


def _release(library: ctypes.CDLL, container: ctypes.c_void_p, handles: Sequence[int]) -> None:
    library.AOTInductorModelContainerDelete(container)
    for alias in _tensors(handles):
        alias.data = alias.new_empty(0)


def example_inputs(model: LanguageModel, length: int, kind: StepKind) -> list[tuple[Any, ...]]:
    """Two inputs as an engine gives them, that differ in every size that may."""
    most = 3 if kind == "rows" else 1
    state = model.init_state(most, length)
    sampler = Sampler(most, model.vocab_size)
    for row in range(most):
        sampler.add_sequence(row, SamplingParams(seed=row), ())
    found: list[tuple[Any, ...]] = []
    for more in (0, 1):
        count = 2 + more if kind == "rows" else 1
        tokens_BT = torch.zeros(count, 2 + more if kind == "prompt" else 1, dtype=torch.long)
        inputs = tokens_BT, model.prefix_view(batch_slice(state, 0, count), length // 2 + more)
        drawn = {name: sampler.state[name][:count] for name in RANDOM_STATE}
        found.append(inputs if kind == "prompt" else (*inputs, drawn))
    return found


def trace_step(model: LanguageModel, length: int, kind: StepKind) -> torch.export.ExportedProgram:
    """A part of a model, of which only the structure matters, for rows of so many positions."""
    given, other = example_inputs(model, length, kind)

    def open_ones(one: Tensor, two: Tensor) -> dict[int, Any]:
        sizes = enumerate(zip(one.shape, two.shape, strict=True))
        return {axis: torch.export.Dim.DYNAMIC for axis, (a, b) in sizes if a != b}

    open_tokens, *open_states = (
        open_ones(one, two)
        if isinstance(one, Tensor)
        else {name: open_ones(one[name], two[name]) for name in one}
        for one, two in zip(given, other, strict=True)
    )
    with torch.no_grad(), TransposedLinear():
        return torch.export.export(
            eager_step(model, kind),
            given,
            dynamic_shapes=(open_tokens, *open_states),
            strict=False,
        )


class TransposedLinear(TorchFunctionMode):
    """`F.linear` in the order of factors that suits the number of rows, which code sees only when it runs."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,  # noqa: ANN401 (as torch gives them)
        given: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """What the function gives."""
        instead = _linear if function is F.linear and not named else function
        return instead(*given, **(named or {}))


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    x_NI = x.reshape(-1, x.shape[-1])
    count = x_NI.shape[0]
    if isinstance(count, int) or x.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return F.linear(x, weight_OI, bias_O)

    def turned(x_NI: Tensor, weight_OI: Tensor, *bias_O: Tensor) -> tuple[Tensor]:
        return (sum(bias_O, (weight_OI @ x_NI.t()).t()).contiguous(),)

    def straight(x_NI: Tensor, weight_OI: Tensor, *bias_O: Tensor) -> tuple[Tensor]:
        return (F.linear(x_NI, weight_OI, *bias_O),)

    fewest, most = TURNED
    # The operator itself: `torch.cond` goes through Dynamo, which may fix the number of rows.
    (y_NO,) = torch.ops.higher_order.cond(
        (count - fewest) * (most - count) >= 0,  # TorchInductor knows no `and` here
        turned,
        straight,
        (x_NI, weight_OI) if bias_O is None else (x_NI, weight_OI, bias_O),
    )
    return y_NO.view(*x.shape[:-1], -1)


def compile_step(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write what was traced as machine code, without weights, to a file."""
    substitute_kernel(program)
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={
            "aot_inductor.package_constants_in_so": False,
            **inductor_config(torch.get_num_threads()),
        },
    )


class CompileJob:
    """What is to be compiled for an engine: the same work has the same name."""

    def __init__(self, engine: Engine, kind: StepKind, threads: int) -> None:
        self.engine, self.kind = engine, kind
        # As lists: tensors of the same contents are not always pickled to the same bytes.
        inlined = [tensor.tolist() for tensor in _inlined(engine.model)]
        structure = _skeleton(engine.model)
        self.work = pickle.dumps((structure, inlined, engine.cache_length, kind, threads))
        root = Path(__file__).parents[2]
        sources = sorted([*root.glob("gpt/**/*.py"), *root.glob("serving/engine/*.py"), KERNEL])
        made_for = (torch.__version__, platform.system(), cpu_info())
        parts = [self.work, repr(made_for).encode()]
        parts += [source.read_bytes() for source in sources]
        self.path = (
            cache_dir() / "steps" / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.pt2"
        )

    def load(self) -> CompiledStep:
        """The compiled part, compared with the model's own; a ValueError says that it is another."""
        part = eager_step(self.engine.model, self.kind)
        compiled = CompiledStep(self.path, part)
        found = []
        with torch.inference_mode():
            for run in (part, compiled):
                inputs = example_inputs(self.engine.model, self.engine.cache_length, self.kind)[0]
                found.append([run(*inputs)[0].float() for _ in range(2)][1])
        wanted, got = found
        off = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
        if not off <= TOLERANCE:
            raise ValueError(f"it is off by {off:.1%}")
        return compiled


def _skeleton(model: LanguageModel) -> LanguageModel:
    """The model without the contents of its tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    hollow = {id(tensor): _hollow(tensor) for tensor in tensors}
    return copy.deepcopy(model, hollow)


def _inlined(model: LanguageModel) -> list[Tensor]:
    """The tensors whose contents are a part of compiled code."""
    tensors = (*model.parameters(), *model.buffers())
    return [tensor for tensor in tensors if tensor.numel() <= INLINED]


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


class Compiler:
    """Compiles for engines in the background, one job after the other."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Engine, StepKind, int] | None] = queue.Queue()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="compiler", daemon=True)
        self._thread.start()

    def add(self, engine: Engine, threads: int) -> None:
        """Let an engine's steps become compiled ones, for so many cores."""
        on_cpu = engine.last_B1.device.type == "cpu"
        if (
            not on_cpu
            or engine.cache_length < SHORTEST
            or engine.deterministic
            or not find_cpp_compiler()
        ):
            return
        kinds: list[StepKind] = ["row"]
        kinds += ["prompt"] if engine.model.supports_chunked_prefill else []
        kinds += ["rows"] if engine.max_num_seqs > 1 else []
        for kind in kinds:
            self._jobs.put((engine, kind, threads))

    def wait(self) -> None:
        """Until all that was added is done."""
        self._jobs.join()

    def close(self) -> None:
        """Stop, whatever is being compiled; a thread that the process' end found in C++ would abort it."""
        self._closed = True
        self._jobs.put(None)
        if self._child:
            self._child.terminate()
        self._thread.join()

    def _work(self) -> None:
        while work := self._jobs.get():
            try:
                if not self._closed:
                    self._replace(*work)
            except Exception as error:  # a full disk, say: the model itself is there
                logger.warning("%s stays uncompiled: %s", work[1], error)
            self._jobs.task_done()

    def _replace(self, engine: Engine, kind: StepKind, threads: int) -> None:
        """Put compiled code in the place of an engine's part, if there is any to be had."""
        job = CompileJob(engine, kind, threads)
        if job.path.exists() or self._compile(job):
            try:
                engine.steps[kind] = run_in_own_thread(job.load)
            except Exception as error:
                job.path.unlink()  # the next server makes it anew
                raise ValueError(f"what was compiled cannot be used: {error}") from error

    def _compile(self, job: CompileJob) -> bool:
        """Whether it worked; what went wrong is logged in a line."""
        job.path.parent.mkdir(parents=True, exist_ok=True)
        beside = job.path.with_name(f"{os.getpid()}-{job.path.name}")
        command = [sys.executable, "-m", "serving.engine.compilation", str(beside)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is for the server
        )
        if self._closed:  # meanwhile
            self._child.terminate()
        _, complaint = self._child.communicate(job.work)
        if self._child.returncode == 0 and beside.exists():
            beside.replace(job.path)
            return True
        beside.unlink(missing_ok=True)
        if not self._closed:
            lines = complaint.decode(errors="replace").strip().splitlines() or ["no reason given"]
            # What reads a prompt token by token has no one shape: nobody needs to hear of that.
            level = logging.INFO if job.kind == "prompt" else logging.WARNING
            logger.log(level, "%s stays uncompiled: %s", job.kind, lines[-1])
        return False


def _follow(parent: int) -> None:
    """Do not outlive a server that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """The life of the process that compiles: work from standard input, the file's path as argument."""
    os.nice(10)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    # From the server that started this process, through a pipe: never from a file.
    model, inlined, length, kind, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    model.to_empty(device="cpu")
    for tensor, numbers in zip(_inlined(model), inlined, strict=True):
        tensor.copy_(torch.tensor(numbers))
    program = trace_step(model, length, kind)
    compile_step(program, Path(sys.argv[1]))


if __name__ == "__main__":
    main()

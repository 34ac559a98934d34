"""Compiled steps: loading AOTInductor's code from a file and calling it."""

import ctypes
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt.models.base import State


class CompiledStep:
    """The compiled code of a step, with the weights of a model.

    It is called through its C interface, torch's `aoti_runtime/interface.h`: torch's own wrapper
    holds Python's GIL while the code runs, and a server could not answer meanwhile.

    Args:
        path: A package of `compile_step`.
        step: The step that was compiled. Its weights are used in place: they must not be moved.
    """

    def __init__(self, path: Path, step: nn.Module) -> None:
        library = _load_library(path)
        container, count = ctypes.c_void_p(), ctypes.c_size_t()

        def call(name: str, *arguments: Any) -> None:  # noqa: ANN401 (as C takes them)
            _check(library[f"AOTInductorModelContainer{name}"](*arguments))

        def constant_name(kind: str, index: int) -> bytes:
            name = ctypes.c_char_p()
            call(f"GetConstant{kind}", container, ctypes.c_size_t(index), ctypes.byref(name))
            return name.value or b""

        call("CreateWithDevice", ctypes.byref(container), ctypes.c_size_t(1), b"cpu", None)
        call("GetNumConstants", container, ctypes.byref(count))
        tensors: dict[str, Tensor] = dict(step.named_parameters(remove_duplicate=False))
        tensors |= step.named_buffers(remove_duplicate=False)
        indices = range(count.value)
        # Aliases: torch never releases the tensor objects themselves.
        weights = [tensors[constant_name("OriginalFQN", i).decode()].detach() for i in indices]
        handles = _to_handles(weights)
        names = [constant_name("Name", i) for i in indices]
        pairs = (_Constant * len(names))(*map(_Constant, names, handles))
        flags = ctypes.c_bool(False), ctypes.c_bool(True)  # use_inactive, validate_full_update
        call("UpdateUserManagedConstantBufferPairs", container, pairs, count, *flags)
        call("GetNumOutputs", container, ctypes.byref(count))
        self._container, self._num_outputs = container, count.value
        self._run = library.AOTInductorModelContainerRunSingleThreaded
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._run.argtypes = [pointer, pointer, size, pointer, size, pointer, pointer]
        weakref.finalize(self, _release, library, container, handles).atexit = False

    def __call__(self, tokens_BT: Tensor, *states: State) -> Sequence[Tensor]:
        """Run the step, with the arguments and results of the module that was compiled."""
        handles = _to_handles([tokens_BT, *(x for state in states for x in state.values())])
        inputs = (ctypes.c_void_p * len(handles))(*handles)
        outputs = (ctypes.c_void_p * self._num_outputs)()
        _check(self._run(self._container, inputs, len(inputs), outputs, len(outputs), None, None))
        return _to_tensors(outputs)


class _Constant(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _to_handles(tensors: list[Tensor]) -> list[int]:
    """Return new handles of tensors. Compiled code frees those of its inputs, we those of constants."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
    return [_capsule_pointer(capsule, None) for capsule in capsules]


def _to_tensors(handles: Iterable[int]) -> list[Tensor]:
    """Return the tensors of handles, and free the handles."""
    capsules = [_new_capsule(handle, None, None) for handle in handles]
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)


def _check(error: int) -> None:
    if error:
        raise RuntimeError("compiled code has failed; it has written why to standard error")


def _load_library(path: Path) -> ctypes.CDLL:
    """Load the shared library in a package, from a temporary file that is not needed afterwards."""
    with zipfile.ZipFile(path) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".so")]
        code = package.read(name)
    if b"aoti_torch_proxy_executor" in code:
        raise ValueError("it has an operator without a C interface")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.so"
        file.write_bytes(code)
        return ctypes.CDLL(str(file))


def _release(library: ctypes.CDLL, container: ctypes.c_void_p, handles: Sequence[int]) -> None:
    library.AOTInductorModelContainerDelete(container)
    for alias in _to_tensors(handles):
        alias.data = alias.new_empty(0)

"""A pretended accelerator, on the CPU build of torch: `install` makes it this process's.

Tensors on the device "fake" keep their data on the CPU, and are computed by its kernels. As on a
GPU, they refuse to meet CPU tensors of one axis or more, have random numbers of their own, and can
be captured and replayed like a CUDA graph. What would wait for a GPU is counted, and refused in a
capture. `install(like="mps")` refuses what MPS lacks: float64, bfloat16 (before macOS 14), pinned
memory, CUDA graphs.

It changes torch for the whole process, so only a process of its own may install it.
"""

import contextlib
import functools
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.library import Library, fallthrough_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
"""Operations whose results, or their shapes, the CPU reads."""
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
"""Their index tensors may be on the CPU: they are copied, which waits. Masks wait for their count."""
COPIES = {aten.copy_.default, aten._to_copy.default}

LOWER_PRECISION = [
    "linear",
    "matmul",
    "mm",
    "mv",
    "bmm",
    "addmm",
    "addmv",
    "addbmm",
    "baddbmm",
    "prelu",
    "gru_cell",
    "lstm_cell",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "einsum",
]
FLOAT32 = [
    "softmax.int",
    "log_softmax.int",
    "layer_norm",
    "rms_norm",
    "norm.ScalarOpt_dim",
    "norm.Scalar",
    "cross_entropy_loss",
    "nll_loss",
    "binary_cross_entropy_with_logits",
    "mse_loss",
    "cumsum",
    "cumprod",
    "prod",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "rsqrt",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "reciprocal",
    "sum",
    "sum.dim_IntList",
    "softplus",
    "cosine_similarity",
]
"""What CUDA's autocast computes in the lower precision and in float32, as far as models use it."""


class AttentionCall(NamedTuple):
    """A call of `scaled_dot_product_attention`."""

    dtype: torch.dtype
    masked: bool
    causal: bool
    head_width: int

    @property
    def is_flash(self):
        """Whether CUDA's flash attention takes it."""
        is_half = self.dtype in (torch.bfloat16, torch.float16)
        return is_half and not self.masked and self.head_width % 8 == 0 and self.head_width <= 256


class FakeTensor(torch.Tensor):
    """A tensor on the fake device."""

    @staticmethod
    def __new__(cls, data):
        with torch.inference_mode(False):  # it may be a view of a tensor made outside
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                data.size(),
                strides=data.stride(),
                storage_offset=data.storage_offset(),
                dtype=data.dtype,
                device=torch.device("fake:0"),
            )
        made.on_cpu = data.detach()
        return made

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            state.record_attention(*args, **kwargs)
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # what leaves the device is an ordinary tensor
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self):
        state.wait("tolist")
        return self.on_cpu.tolist()

    def __repr__(self, **_):
        return f"FakeTensor({self.on_cpu!r})"

    def untyped_storage(self):
        return self.on_cpu.untyped_storage()

    def numpy(self, **_):
        raise TypeError("can't convert fake:0 device type tensor to numpy: use Tensor.cpu() first")

    # torch makes a tensor of a list, on the device itself, before anything is dispatched.

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)


def _index(index):
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    if isinstance(index, list | range):
        return torch.tensor(index) if index else torch.tensor([], dtype=torch.long)
    return index


class State:
    """What happened on the device."""

    def __init__(self):
        self.like = "cuda"
        self.generator = torch.Generator()
        self.pinned = {}
        """Storages in pinned memory, by address."""
        self.graph = None
        """The graph being captured."""
        self.reset()

    def reset(self):
        self.waits, self.operations = Counter(), Counter()
        self.dtypes, self.attention = Counter(), []

    def wait(self, reason):
        """Count a synchronization of CPU and device."""
        self.waits[str(reason)] += 1
        if self.graph is not None:
            raise RuntimeError(f"{reason} waits for the device: not permitted in a capture")

    @contextlib.contextmanager
    def random_numbers(self):
        """Within it, the CPU's kernels draw the random numbers of the device."""
        cpu_state = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(cpu_state)

    def record_attention(self, query, key, value, attn_mask=None, is_causal=False, **_):
        dtype = query.dtype
        if torch.is_autocast_enabled("fake"):
            dtype = torch.get_autocast_dtype("fake")
        self.attention.append(
            AttentionCall(dtype, attn_mask is not None, is_causal, query.shape[-1])
        )


state = State()


class CUDAGraph:
    """Stands in for torch.cuda.CUDAGraph: operations on the tensors that they were captured with."""

    def __init__(self):
        self.steps, self.before = [], {}

    def add(self, function, args, kwargs, result):
        self.steps.append((function, args, kwargs, result))

    def save(self, tensor):
        """Remember a storage that is about to be written: a capture computes nothing."""
        storage = tensor.untyped_storage()
        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def restore(self):
        for storage, content in self.before.values():
            storage.copy_(content)
        self.before.clear()

    def replay(self):
        state.operations["graph replay"] += 1
        for function, args, kwargs, result in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and _address(old) != _address(new):
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph, pool=None, stream=None, capture_error_mode="global"):
    """Stands in for torch.cuda.graph."""
    state.wait("the start of a capture")
    state.graph = graph
    try:
        yield
    finally:
        state.graph = None
        graph.restore()


class Module(_DummyBackendModule):
    """torch.fake, with what torch.mps has."""

    def manual_seed_all(self, seed):
        state.generator.manual_seed(seed)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device="fake"):
        return state.generator.get_state()

    def set_rng_state(self, new_state, device="fake"):
        state.generator.set_state(new_state)


class CUDAModule(Module):
    """torch.fake, with what torch.cuda has."""

    CUDAGraph, Stream = CUDAGraph, object
    graph = staticmethod(capture)
    has_bfloat16 = True

    def graph_pool_handle(self):
        return (0, 1)

    def is_bf16_supported(self, including_emulation=True):
        return including_emulation or self.has_bfloat16

    def get_device_name(self, device):
        return "Fake H100"


def install(like="cuda"):
    """Make the fake device this process's accelerator."""
    state.like = like
    _setup_privateuseone_for_python_backend("fake", CUDAModule() if like == "cuda" else Module())
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    global _libraries  # they live as long as the process
    _libraries = [Library("_", "IMPL"), Library("aten", "IMPL")]
    fallback, autocast = _libraries
    fallback.fallback(fallthrough_kernel, "AutocastPrivateUse1")
    for names, to_float32 in ((LOWER_PRECISION, False), (FLOAT32, True)):
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(aten, packet), overload or "default")
            kernel = functools.partial(_autocast, operation, to_float32)
            autocast.impl(name, kernel, "AutocastPrivateUse1")
    Device().__enter__()  # for the rest of the process


def _autocast(operation, to_float32, *args, **kwargs):
    """Call an operation under autocast with its arguments cast."""
    dtype = torch.float32 if to_float32 else torch.get_autocast_dtype("fake")

    def cast(value):
        casts = isinstance(value, FakeTensor) and value.dtype in FLOATS
        return value.to(dtype) if casts else value

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return operation(*tree_map(cast, args), **tree_map(cast, kwargs))


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _is_on_device(device):
    return device is not None and torch.device(device).type == "fake"


def _address(tensor):
    return tensor.untyped_storage().data_ptr()


def _writes(function):
    return any(a.alias_info and a.alias_info.is_write for a in function._schema.arguments)


def compute(function, args, kwargs):
    """Run an operation with tensors on the device or results there."""
    if torch.is_inference_mode_enabled() and function._can_decompose():
        with (
            Device()
        ):  # otherwise it would be one operation, such as `item`, of which nothing is known
            return function.decompose(*args, **kwargs)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    inside = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
    outside = [tensor for tensor in given if not isinstance(tensor, FakeTensor) and tensor.ndim]
    device = kwargs.get("device")
    state.operations[str(function)] += 1
    if inside and outside and function in INDEXING:
        state.wait(f"{function} with an index on the CPU")
    elif inside and outside and function not in COPIES:
        raise RuntimeError(
            f"{function}: expected all tensors on one device, but those of shapes "
            f"{[tuple(t.shape) for t in outside]} are on the CPU and {[tuple(t.shape) for t in inside]} "
            "on fake:0"
        )
    _count_waits(function, args, kwargs)

    def on_cpu(value):
        return value.on_cpu if isinstance(value, FakeTensor) else value

    cpu_args, cpu_kwargs = tree_map(on_cpu, (args, kwargs))
    if device is not None:
        cpu_kwargs["device"] = torch.device("cpu")
    cpu_kwargs.pop("pin_memory", None)
    graph = state.graph
    if graph is not None and _writes(function):
        for tensor in tree_leaves(cpu_args[0]):
            graph.save(tensor)
    is_random = torch.Tag.nondeterministic_seeded in function.tags
    with state.random_numbers() if is_random else contextlib.nullcontext():
        result = function(*cpu_args, **cpu_kwargs)
    if graph is not None:
        graph.add(function, cpu_args, cpu_kwargs, result)
    if _writes(function) and args and isinstance(args[0], torch.Tensor):
        return args[0]
    stays = _is_on_device(device) or (device is None and bool(inside))

    def wrap(value):
        if not (stays and isinstance(value, torch.Tensor)):
            return value
        if state.like == "mps" and value.dtype in (torch.float64, torch.bfloat16):
            raise TypeError(f"{function}: the MPS framework does not support {value.dtype}")
        state.dtypes[str(function), value.dtype] += 1
        return FakeTensor(value)

    return tree_map(wrap, result)


def _count_waits(function, args, kwargs):
    if function in WAITS:
        state.wait(function)
    if function in INDEXING and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    ):
        state.wait(f"{function} with a mask")
    if function is aten.copy_.default:
        source, target = args[1], args[0]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    elif function is aten._to_copy.default:
        source, target = args[0], None
        non_blocking = kwargs.get("non_blocking", False)
    else:
        return
    from_device = isinstance(source, FakeTensor)
    to_device = (
        _is_on_device(kwargs.get("device", source.device))
        if target is None
        else (isinstance(target, FakeTensor))
    )
    if from_device != to_device:
        if to_device and non_blocking and _address(source) in state.pinned:
            state.operations["non-blocking copy from pinned memory"] += 1
        else:
            state.wait(f"a copy {'to' if to_device else 'from'} the device")


class Device(TorchDispatchMode):
    """Within it, tensors can be made on the device, and pinned."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten.is_pinned.default:
            return _address(args[0]) in state.pinned
        if function in (aten.pin_memory.default, aten._pin_memory.default):
            if state.like == "mps":
                raise RuntimeError("MPS has no pinned memory")
            storage = (pinned := args[0].clone()).untyped_storage()
            state.pinned[storage.data_ptr()] = storage
            return pinned
        has_inside = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if has_inside or _is_on_device(kwargs.get("device")):
            return compute(function, args, kwargs)
        return function(*args, **kwargs)

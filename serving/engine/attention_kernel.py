"""A C++ kernel for the attention of one query in compiled decode steps.

The code that TorchInductor generates for it reads keys and values at about half the speed of
memory, and gives whole heads to threads; in a long sequence nothing else of a step takes longer.
So the attention of a traced step becomes the operator `tinygpt::attend`, and
`attention_kernel.h`, which implements it, becomes a part of the step's generated code.
"""

from pathlib import Path
from typing import Any

import torch
from torch import library
from torch.export import ExportedProgram

KERNEL = Path(__file__).with_name("attention_kernel.h")
CACHE_DTYPES = {torch.float32, torch.bfloat16}
"""Dtypes of keys and values that the kernel supports."""
LANES = 16
"""Floats in the widest vector registers: the width of a head must be a multiple of it."""

library.define(
    "tinygpt::attend",
    "(Tensor queries_BH1K, Tensor keys_BHSK, Tensor values_BHSK, Tensor mask_B11S) -> Tensor",
    # Keys and values are read in place, as slices of a state, not copied to other strides.
    tags=torch.Tag.flexible_layout,
)


library.register_fake(
    "tinygpt::attend", lambda queries_BH1K, *_: queries_BH1K.new_empty(queries_BH1K.shape)
)


def substitute_kernel(program: ExportedProgram) -> None:
    """Replace the attention of one query by the operator, in place, wherever the kernel supports it."""
    aten, graph = torch.ops.aten, program.graph
    attention = aten.scaled_dot_product_attention.default
    for node in graph.find_nodes(op="call_function", target=attention):
        queries, *cached, mask = node.args[:4]
        # The keys and values in their own dtype, before they are converted to that of the queries.
        cached = [kv.args[0] if kv.target is aten.type_as.default else kv for kv in cached]
        queries_BHTK, dtypes = queries.meta["val"], {kv.meta["val"].dtype for kv in cached}
        is_supported = (
            len(node.args) == 4
            and not node.kwargs
            and queries_BHTK.shape[2] == 1
            and queries_BHTK.shape[3] % LANES == 0
            and dtypes <= CACHE_DTYPES
        )
        if not is_supported:
            continue
        with graph.inserting_before(node):
            queries = graph.call_function(aten.to.dtype, (queries, torch.float32))
            attend = torch.ops.tinygpt.attend.default
            output = graph.call_function(attend, (queries, *cached, mask))
            output = graph.call_function(aten.to.dtype, (output, queries_BHTK.dtype))
        node.replace_all_uses_with(output)
        graph.erase_node(node)
    program.graph_module.recompile()


def inductor_config(num_threads: int) -> dict[str, Any]:
    """Return TorchInductor options that include the kernel in a step's code, for `num_threads`."""
    # Torch puts `extern` before and a semicolon after what should declare the operator's C function.
    code = f'"C++" {{\n#define THREADS {num_threads}\n#include "{KERNEL}"\n}}'
    return {
        "aot_inductor.custom_ops_to_c_shims": {torch.ops.tinygpt.attend.default: [code]},
        "aot_inductor.compile_wrapper_opt_level": "O3",  # as the code of kernels
    }

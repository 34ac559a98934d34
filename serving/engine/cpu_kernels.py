"""C++ kernels in compiled steps, where TorchInductor's code or torch's product is slow.

- The attention of one query: the generated code reads keys and values at about half the speed of
  memory, and gives whole heads to threads; in a long sequence nothing else of a step takes longer.
- The 8-bit product of few rows: oneDNN repacks the weights at every call, or pads one row to the
  sixteen of an AMX tile.

In a traced step both are operators, which the headers beside this file implement as a part of the
step's generated code.
"""

from pathlib import Path
from typing import Any

import torch
from torch import library
from torch.export import ExportedProgram

from gpt.kernels.quantization import is_int_mm_exact

HEADERS = tuple(Path(__file__).with_name(f"{name}_kernel.h") for name in ("attention", "int8"))
CACHE_DTYPES = {torch.float32, torch.bfloat16}
"""Dtypes of keys and values that the attention kernel supports."""
LANES = 16
"""Floats in the widest vector registers: the width of a head must be a multiple of it."""
MAX_INT8_ROWS = 8
"""With more rows `torch._int_mm` is faster than the int8 kernel, where it is exact."""
MIN_INT8_WEIGHTS = 2**17
"""With fewer weights it is faster too, except with AMX, whose tiles have sixteen rows."""

library.define(
    "tinygpt::attend",
    "(Tensor queries_BH1K, Tensor keys_BHSK, Tensor values_BHSK, Tensor mask_B11S) -> Tensor",
    # Keys and values are read in place, as slices of a state, not copied to other strides.
    tags=torch.Tag.flexible_layout,
)


library.register_fake(
    "tinygpt::attend", lambda queries_BH1K, *_: queries_BH1K.new_empty(queries_BH1K.shape)
)


def substitute_attention(program: ExportedProgram) -> None:
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
            and not node.kwargs.keys() - {"enable_gqa"}
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
    """Return TorchInductor options that include the kernels in a step's code, for `num_threads`."""
    is_exact = is_int_mm_exact()
    max_rows = MAX_INT8_ROWS if is_exact else torch.iinfo(torch.int64).max
    has_amx = torch.cpu._is_amx_tile_supported()
    min_weights = MIN_INT8_WEIGHTS if is_exact and not has_amx else 0
    definitions = f"""
#define THREADS {num_threads}
#define MAX_INT8_ROWS {max_rows}
#define MIN_INT8_WEIGHTS {min_weights}
"""
    operators = (torch.ops.tinygpt.attend.default, torch.ops.tinygpt.int8_mm.default)
    return {
        "aot_inductor.custom_ops_to_c_shims": {
            # Torch puts `extern` before and a semicolon after what should declare the C function.
            operator: [f'"C++" {{{definitions}#include "{header}"\n}}']
            for operator, header in zip(operators, HEADERS, strict=True)
        },
        "aot_inductor.compile_wrapper_opt_level": "O3",  # as the code of kernels
    }

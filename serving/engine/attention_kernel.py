"""The attention of one query in compiled steps, written by hand: all that a text's length costs.

What TorchInductor makes of it reads keys and values at about half the speed of memory, and
gives whole heads to threads. So a graph's attention becomes an operator of our own, and
`attention_kernel.h`, which computes it, becomes a part of the code that the graph is compiled to.
"""

from pathlib import Path
from typing import Any

import torch
from torch import library
from torch.export import ExportedProgram

KERNEL = Path(__file__).with_name("attention_kernel.h")
FORMATS = {torch.float32, torch.bfloat16}
"""Of the keys and values that it reads."""
LANES = 16
"""The width of a head is a multiple of it: what the widest registers hold."""

library.define(
    "tinygpt::attend",
    "(Tensor queries_BH1K, Tensor keys_BHSK, Tensor values_BHSK, Tensor mask_B11S) -> Tensor",
    # Keys and values are taken where they lie, in a slice of a state: no copy with other strides.
    tags=torch.Tag.flexible_layout,
)


library.register_fake(
    "tinygpt::attend", lambda queries_BH1K, *_: queries_BH1K.new_empty(queries_BH1K.shape)
)


def substitute_kernel(program: ExportedProgram) -> None:
    """Let a traced step use the operator wherever one query attends to what is kept for it."""
    aten, graph = torch.ops.aten, program.graph
    attention = aten.scaled_dot_product_attention.default
    for node in graph.find_nodes(op="call_function", target=attention):
        queries, *kept, mask = node.args[:4]
        # As they are kept, not as the model would have them.
        kept = [given.args[0] if given.target is aten.type_as.default else given for given in kept]
        queries_BHTK, formats = queries.meta["val"], {given.meta["val"].dtype for given in kept}
        one = queries_BHTK.shape[2] == 1 and queries_BHTK.shape[3] % LANES == 0
        if len(node.args) != 4 or node.kwargs or not one or not formats <= FORMATS:
            continue
        with graph.inserting_before(node):
            wide = graph.call_function(aten.to.dtype, (queries, torch.float32))
            attend = graph.call_function(torch.ops.tinygpt.attend.default, (wide, *kept, mask))
            mixed = graph.call_function(aten.to.dtype, (attend, queries_BHTK.dtype))
        node.replace_all_uses_with(mixed)
        graph.erase_node(node)
    program.graph_module.recompile()


def inductor_config(threads: int) -> dict[str, Any]:
    """What makes TorchInductor put the kernel, for so many threads, beside the graph's own code."""
    # Torch writes `extern` before and a semicolon behind what should declare the operator's C function.
    code = f'"C++" {{\n#define THREADS {threads}\n#include "{KERNEL}"\n}}'
    return {
        "aot_inductor.custom_ops_to_c_shims": {torch.ops.tinygpt.attend.default: [code]},
        "aot_inductor.compile_wrapper_opt_level": "O3",  # as the code of its own
    }

"""8-bit integer matrices: each token reads a quarter of the bytes, and integer sums are exact.

    w_NK ~ scale_N q_NK     scale = max |w| / 127 of each output, computed once
    x_BK ~ scale_B p_BK     the same for each row, at every product
    y_BN = scale_B scale_N (p q^T)

This is the plain form of LLM.int8() (Dettmers et al. 2022); small models do not need its 16-bit
path for outliers. Embeddings are looked up, not multiplied, and are not quantized.
"""

import functools
from typing import Literal

import torch
from torch import Tensor, library, nn

from gpt.models.base import LanguageModel

DType = Literal["float32", "bfloat16", "int8"]

library.define("tinygpt::int8_mm", "(Tensor x_BK, Tensor weight_NK) -> Tensor")


@library.impl("tinygpt::int8_mm", "cpu")
def _int8_mm(x_BK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return products of 8-bit integers in int32; `serving/engine/int8_kernel.h` is faster."""
    if is_int_mm_exact():
        return torch._int_mm(x_BK, weight_NK.T)
    return (x_BK.float() @ weight_NK.float().T).round().to(torch.int32)


library.register_fake(
    "tinygpt::int8_mm",
    lambda x_BK, weight_NK: x_BK.new_empty((x_BK.shape[0], weight_NK.shape[0]), dtype=torch.int32),
)


@functools.cache
def is_int_mm_exact() -> bool:
    """Return whether `torch._int_mm` is exact here.

    On processors without VNNI it adds pairs of products in 16 bits, which overflow.
    """
    largest = [torch.full((rows, 64), 127, dtype=torch.int8) for rows in (1, 17)]
    return all((torch._int_mm(x_BK, largest[1].T) == 64 * 127**2).all() for x_BK in largest)


class Int8Linear(nn.Module):
    """`nn.Linear` with weights and inputs rounded to 8 bits, for inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantized: Tensor
        self.scale: Tensor
        quantized_NK, scale_N1 = _quantize_rows(linear.weight.detach().float())
        self.register_buffer("quantized", quantized_NK)
        self.register_buffer("scale", scale_N1.squeeze(1))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The dequantized weight_NK in float32, for inspection; `forward` is faster."""
        return self.quantized * self.scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (..., K) to y of shape (..., N), in float32."""
        p_BK, scale_B1 = _quantize_rows(x.flatten(0, -2))
        y_BN = torch.ops.tinygpt.int8_mm(p_BK, self.quantized) * (scale_B1 * self.scale)
        if self.bias is not None:
            y_BN = y_BN + self.bias
        return y_BN.unflatten(0, x.shape[:-1])


def _quantize_rows(x_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row as 8-bit integers, and scale_B1 by which to multiply them."""
    # A row of zeros has no scale of its own.
    scale_B1 = x_BK.abs().amax(dim=1, keepdim=True).clamp(min=1e-12 * 127) / 127
    return (x_BK / scale_B1).round().to(torch.int8), scale_B1


def quantize(model: LanguageModel, dtype: DType) -> LanguageModel:
    """Change the model in place to compute in `dtype`, in evaluation mode, and return it.

    int8 on a device other than a CPU is a ValueError.
    """
    model.eval().requires_grad_(False)
    if dtype == "bfloat16":
        return model.bfloat16()
    if dtype == "int8":
        device = next(model.parameters()).device
        if device.type != "cpu":
            raise ValueError(f"int8 is for a CPU: on {device} take bfloat16")
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Int8Linear(child))
        # Otherwise the KV cache of a long sequence is most of what a token reads.
        model.cache_dtype = torch.bfloat16
    return model


def has_exact_logits(model: LanguageModel) -> bool:
    """Return whether rounding moves a logit by no more than float32 on a CPU does."""
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    device = next(model.parameters()).device
    return device.type == "cpu" and not dtypes & {torch.bfloat16, torch.float16, torch.int8}

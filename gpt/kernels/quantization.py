"""Matrices of 8-bit integers: a token then costs a quarter of the bytes, and whole numbers are summed exactly.

    w_NK ~ scale_N q_NK     scale = max |w| / 127 of each output, once
    x_BK ~ scale_B p_BK     the same of each row, at every product
    y_BN = scale_B scale_N (p q^T)

That is the plain form of LLM.int8() (Dettmers et al. 2022), whose 16-bit path for outliers small
models do not need. Embeddings are looked up, not multiplied, and stay as they are.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from gpt.models.base import LanguageModel

DType = Literal["float32", "bfloat16", "int8"]

SMALLEST = 1e-12
"""Of a scale: a row of zeros has none of its own."""


class Int8Linear(nn.Module):
    """`nn.Linear` with weights and inputs rounded to 8 bits; to be used, not trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rounded: Tensor
        self.scale: Tensor
        rounded_NK, scale_N1 = _rounded(linear.weight.detach().float())
        self.register_buffer("rounded", rounded_NK)
        self.register_buffer("scale", scale_N1.squeeze(1))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """weight_NK in float32, as near as 8 bits are, for who looks at it: to multiply by it takes longer."""
        return self.rounded * self.scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """X of any leading axes and K -> the same and N, in float32."""
        p_BK, scale_B1 = _rounded(x.flatten(0, -2))
        y_BN = torch._int_mm(p_BK, self.rounded.T) * (scale_B1 * self.scale)
        if self.bias is not None:
            y_BN = y_BN + self.bias
        return y_BN.unflatten(0, x.shape[:-1])


def _rounded(x_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as 8-bit integers, and the scale_B1 to multiply them by."""
    scale_B1 = x_BK.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST * 127) / 127
    return (x_BK / scale_B1).round().to(torch.int8), scale_B1


def quantize(model: LanguageModel, dtype: DType) -> LanguageModel:
    """The model, in evaluation mode and changed in place to compute in `dtype`.

    A ValueError says where a device cannot.
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
        # Else a long text's keys and values are most of what a token reads.
        model.cache_dtype = torch.bfloat16
    return model


def has_exact_logits(model: LanguageModel) -> bool:
    """Whether rounding moves a logit by no more than float32 does, on a CPU."""
    kinds = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    device = next(model.parameters()).device
    return device.type == "cpu" and not kinds & {torch.bfloat16, torch.float16, torch.int8}

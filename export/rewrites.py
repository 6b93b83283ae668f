"""Other forms of the same computation, that an NPU may run faster: `--rewrites` of the graphs for Ascend.

rows       a product of (B, T, D) with a weight as one of (B * T, D): a matrix unit is fed rows, not batches of them
packed     products of one input, such as queries, keys and values, as one (export/packed.py)
padded     the tokens of a picture filled up to a multiple of 16 with some that nothing looks at, 577 to 592
tanh-gelu  GELU by tanh. Not the same function: it is up to 5e-4 away

Nobody has measured them on an NPU here, so none is used unasked. The parity that is measured when a graph is written is that to
the model as it is, so each of them is proven each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from export.targets import PADDED, ROWS, TANH_GELU
from models.vit import VisionTransformer

CUBE = 16  # rows of the blocks that Ascend's matrix unit works on


class Forms(TorchFunctionMode):
    """While a module is traced, has its products and GELUs done in the forms asked for."""

    def __init__(self, rewrites: Collection[str]) -> None:
        super().__init__()
        self.rewrites = rewrites

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and ROWS in self.rewrites:
            return by_rows(*args, **(kwargs or {}))
        if func is F.gelu and TANH_GELU in self.rewrites:
            return F.gelu(args[0], approximate="tanh")
        return func(*args, **(kwargs or {}))


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of (..., D) with a weight (E, D), as a product of two matrices: (..., E)."""
    y = x.reshape(-1, x.shape[-1]) @ weight.t()  # (rows, E)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


def pad_tokens(module: nn.Module, rewrites: Collection[str]) -> None:
    """Have the image encoders in `module` fill up their tokens, if that is asked for."""
    if PADDED in rewrites:
        for part in module.modules():
            if isinstance(part, VisionTransformer):
                part.spare = -part.pos_embed.shape[1] % CUBE

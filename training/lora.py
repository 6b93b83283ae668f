"""LoRA: a language model that stays as it is, beside whose matrices narrow ones are learnt (Hu et al. 2021, arXiv 2106.09685).

A matrix W (O, I) becomes W + alpha / rank * up (O, R) down (R, I). `up` begins as zeros, so nothing changes at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import Misuse
from models.llama import Llama
from models.llm_config import T5Config
from models.opt import Opt
from models.t5 import T5

BASE = ".base"  # ends the name of a layer that has narrow matrices beside it


class Lora(nn.Module):
    """A linear layer with narrow matrices beside its own, which stays as it is."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        y: Tensor = self.base(x)
        narrow = F.linear(F.dropout(x, self.dropout, self.training), self.down)  # (..., R)
        return y + self.scale * F.linear(narrow, self.up)


def add_lora(llm: Opt | Llama | T5, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Put narrow matrices beside those that make queries and values, in every layer; all else of `llm` is frozen.

    Raises Misuse for a rank that is not narrower than the matrices.
    """
    llm.requires_grad_(False)
    names = ("q", "v") if isinstance(llm.cfg, T5Config) else ("q_proj", "v_proj")
    for parent, name in list(_places(llm, names)):
        base = getattr(parent, name)
        if not 0 < rank < min(base.in_features, base.out_features):
            limit = min(base.in_features, base.out_features)
            raise Misuse(f"model.lora.rank is {rank}; expected 1 to {limit - 1}, less than the matrices are wide.")
        setattr(parent, name, Lora(base, rank, alpha, dropout))


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole `tensors` of `model`, by name, with the narrow matrices added to those they stand beside: those of a model that
    was built without them, and gives the same."""
    scales = {name: part.scale for name, part in model.named_modules() if isinstance(part, Lora)}
    found = {}
    for name, tensor in tensors.items():
        place, _, kind = name.rpartition(".")
        beside = place.removesuffix(BASE)
        if beside not in scales:
            found[name] = tensor
        elif place.endswith(BASE):
            if kind == "weight":
                # In float32 also where the language model has half: rounded to that, it would not give what was learnt.
                tensor = tensor.float() + scales[beside] * tensors[f"{beside}.up"] @ tensors[f"{beside}.down"]
            found[f"{beside}.{kind}"] = tensor
    return found


def _places(llm: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    for parent in llm.modules():
        for name, child in parent.named_children():
            if name in names and isinstance(child, nn.Linear):
                yield parent, name

"""In which precision a model computes, while it learns and while it is measured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from models.blip2_llm import Blip2Llm
from models.stored import compute_in_float32
from training.settings import Settings

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precisely(settings: Settings, device: torch.device) -> AbstractContextManager[object]:
    """Within it matrix products have the precision that is asked for."""
    kind = PRECISIONS.get(settings.run.precision)
    return torch.autocast(device.type, kind) if kind else nullcontext()


def widened(model: nn.Module) -> AbstractContextManager[object]:
    """Within it a language model that is stored in half precision computes in float32, in the backward pass too."""
    return compute_in_float32(model.llm_model) if isinstance(model, Blip2Llm) else nullcontext()

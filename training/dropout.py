"""What is left out at random while a model learns: BERT's dropout, and the ViT's stochastic depth.

Places of dropout: salesforce/BLIP models/med.py and salesforce/LAVIS models/blip2_models/Qformer.py, both
transformers' BertModel: embeddings after their norm, attention after its softmax, and every sub-layer before it is added.
Stochastic depth: salesforce/BLIP models/vit.py and salesforce/LAVIS models/eva_vit.py, with timm's DropPath (Huang et al. 2016,
arXiv 1603.09382).

Modules in eval mode, as all are that are frozen or measured, leave out nothing. Numbers come from torch's own generator.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import Attention, Embeddings, ResidualOutput
from models.qformer import QueryEmbeddings


def add_dropout(model: nn.Module, share: float) -> None:
    """Leave out `share` of what BERT computes in `model`: text encoder, decoder, Q-Former. Once for a model."""
    for module in model.modules() if share else ():
        if isinstance(module, Embeddings | QueryEmbeddings):
            module.LayerNorm.register_forward_hook(partial(_values, share))
        elif isinstance(module, ResidualOutput):
            module.dense.register_forward_hook(partial(_values, share))
        elif isinstance(module, Attention):
            module.dropout = share


def add_drop_path(image_encoder: nn.Module, rate: float) -> None:
    """Let pictures pass by the layers of `image_encoder`: none by the first layer, a share of `rate` by the last one, rising
    evenly between them. Once for a model."""
    blocks = [module for module in image_encoder.modules() if {"attn", "mlp"} <= {name for name, _ in module.named_children()}]
    for block, share in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for name in ("attn", "mlp") if share else ():
            block.get_submodule(name).register_forward_hook(partial(_pictures, share))


def _values(share: float, module: nn.Module, given: object, y: Tensor) -> Tensor:
    return F.dropout(y, share, module.training)


def _pictures(share: float, module: nn.Module, given: object, y: Tensor) -> Tensor:
    """(B, T, D): 0 for a share of the B pictures, and the others so much larger that the mean stays."""
    return y * F.dropout(y.new_ones(len(y), 1, 1), share) if module.training else y

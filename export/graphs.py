"""What each graph computes, as a function of the model and the graph's inputs.

The names, and the order of inputs and outputs, are those of models/spec.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.blip import BlipRetrieval

Outputs = Tensor | tuple[Tensor, ...]


def image_embed(blip: BlipRetrieval, input_image: Tensor) -> Tensor:
    """(B, 3, S, S) to image_embed (B, E)."""
    return blip.image_embed(blip.image_feat(input_image))


def image(blip: BlipRetrieval, input_image: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) to image_embed (B, E) and image_feat (B, T, D), in one pass of the ViT."""
    feat = blip.image_feat(input_image)
    return blip.image_embed(feat), feat


def itm(blip: BlipRetrieval, text_ids: Tensor, text_atten_mask: Tensor, image_feat: Tensor) -> Tensor:
    """Caption and picture, pair by pair: ids and mask (B, L), features (B, T, D) to itm_logits (B, 2)."""
    return blip.itm_logits(text_ids, text_atten_mask, blip.text_encoder.image_kv(image_feat))


def itm_cached(blip: BlipRetrieval, text_ids: Tensor, text_atten_mask: Tensor, cross_kv: Tensor) -> Tensor:
    """B captions of ONE picture: ids and mask (B, L), cross_kv (1, 2 * layers, H, T, K) to itm_logits (B, 2)."""
    tensors = cross_kv.unbind(dim=1)  # 2 * layers of (1, H, T, K)
    kv = list(zip(tensors[::2], tensors[1::2], strict=True))
    return blip.itm_logits(text_ids, text_atten_mask, kv, shared=True)


GRAPHS: dict[str, Callable[..., Outputs]] = {
    "text_embed": BlipRetrieval.text_embed,
    "image_embed": image_embed,
    "image_feat": BlipRetrieval.image_feat,
    "image": image,
    "image_kv": BlipRetrieval.image_kv,
    "itm": itm,
    "itm_cached": itm_cached,
}


class Graph(nn.Module):
    """One graph as the exporters want it. It borrows the model: only the weights that the function uses are exported."""

    def __init__(self, name: str, blip: BlipRetrieval) -> None:
        super().__init__()
        self.compute = GRAPHS[name]
        self.blip = blip

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.compute(self.blip, *inputs)


def module_for(name: str, blip: BlipRetrieval) -> nn.Module:
    """The module that computes graph `name` of `blip`, in eval mode."""
    return Graph(name, blip).eval()


def random_inputs(name: str, blip: BlipRetrieval, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Inputs of graph `name` that a real run could meet: captions of unequal length, features of real pictures.

    Random features would have another distribution than the encoder's, so they are computed from random pictures.
    """
    cfg, draw = blip.cfg, torch.Generator().manual_seed(seed)
    size = cfg.vision.image_size
    inputs: dict[str, Tensor] = {}
    if name in ("text_embed", "itm", "itm_cached"):
        lengths = torch.randint(1, length + 1, (batch, 1), generator=draw)  # (B, 1)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()  # (B, L)
        inputs["text_ids"] = torch.randint(1, cfg.text.vocab, (batch, length), generator=draw) * mask
        inputs["text_atten_mask"] = mask
    if name in ("image_embed", "image_feat", "image"):
        inputs["input_image"] = torch.randn(batch, 3, size, size, generator=draw)
    if name in ("image_kv", "itm", "itm_cached"):
        pictures = 1 if name == "itm_cached" else batch
        with torch.no_grad():
            feat = blip.image_feat(torch.randn(pictures, 3, size, size, generator=draw))
            if name == "itm_cached":
                inputs["cross_kv"] = blip.image_kv(feat)
            else:
                inputs["image_feat"] = feat
    return inputs

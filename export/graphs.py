"""One small module per graph. Each borrows its parts from the model, so only the weights it uses are exported.

The name of the module's entry, and the order of its inputs and outputs, are those of models/spec.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.bert import KeysValues
from models.blip import BlipRetrieval


class TextEmbed(nn.Module):
    """text_ids, text_atten_mask (B, L) to text_embed (B, E)."""

    def __init__(self, blip: BlipRetrieval) -> None:
        super().__init__()
        self.blip = blip

    def forward(self, text_ids: Tensor, text_atten_mask: Tensor) -> Tensor:
        return self.blip.text_embed(text_ids, text_atten_mask)


class ImageEmbed(nn.Module):
    """input_image (B, 3, S, S) to image_embed (B, E)."""

    def __init__(self, blip: BlipRetrieval) -> None:
        super().__init__()
        self.blip = blip

    def forward(self, input_image: Tensor) -> Tensor:
        return self.blip.image_embed(self.blip.image_feat(input_image))


class ImageFeat(nn.Module):
    """input_image (B, 3, S, S) to image_feat (B, T, D)."""

    def __init__(self, blip: BlipRetrieval) -> None:
        super().__init__()
        self.blip = blip

    def forward(self, input_image: Tensor) -> Tensor:
        return self.blip.image_feat(input_image)


class Image(nn.Module):
    """input_image (B, 3, S, S) to image_embed (B, E) and image_feat (B, T, D), in one pass of the ViT."""

    def __init__(self, blip: BlipRetrieval) -> None:
        super().__init__()
        self.blip = blip

    def forward(self, input_image: Tensor) -> tuple[Tensor, Tensor]:
        feat = self.blip.image_feat(input_image)
        return self.blip.image_embed(feat), feat


class ImageKV(nn.Module):
    """image_feat (B, T, D) to cross_kv (B, 2 * layers, H, T, K)."""

    def __init__(self, blip: BlipRetrieval) -> None:
        super().__init__()
        self.blip = blip

    def forward(self, image_feat: Tensor) -> Tensor:
        return self.blip.image_kv(image_feat)


class Itm(nn.Module):
    """Caption and picture, pair by pair: text_ids, text_atten_mask (B, L) and image_feat (B, T, D) to itm_logits (B, 2)."""

    def __init__(self, blip: BlipRetrieval) -> None:
        super().__init__()
        self.blip = blip

    def forward(self, text_ids: Tensor, text_atten_mask: Tensor, image_feat: Tensor) -> Tensor:
        return self.blip.itm_logits(text_ids, text_atten_mask, self.blip.text_encoder.image_kv(image_feat))


class ItmCached(nn.Module):
    """B captions of ONE picture: text_ids, text_atten_mask (B, L) and cross_kv (1, 2 * layers, H, T, K) to itm_logits (B, 2)."""

    def __init__(self, blip: BlipRetrieval) -> None:
        super().__init__()
        self.blip = blip

    def forward(self, text_ids: Tensor, text_atten_mask: Tensor, cross_kv: Tensor) -> Tensor:
        tensors = cross_kv.unbind(dim=1)  # 2 * layers of (1, H, T, K)
        kv: list[KeysValues] = list(zip(tensors[::2], tensors[1::2], strict=True))
        return self.blip.itm_logits(text_ids, text_atten_mask, kv, shared=True)


MODULES: dict[str, type[nn.Module]] = {
    "text_embed": TextEmbed,
    "image_embed": ImageEmbed,
    "image_feat": ImageFeat,
    "image": Image,
    "image_kv": ImageKV,
    "itm": Itm,
    "itm_cached": ItmCached,
}


def module_for(name: str, blip: BlipRetrieval) -> nn.Module:
    """The module that computes graph `name` of `blip`, in eval mode."""
    return MODULES[name](blip).eval()


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

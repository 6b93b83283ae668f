"""What each graph computes, as a function of the model and the graph's inputs.

The names, and the order of inputs and outputs, are those of models/spec.py. Axes as there. The graphs that write words are in
export/generation_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from export.generation_graphs import Computations, Outputs, generation_graphs
from export.random_scene import Model
from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval, Retrieval


def image_embed(blip: BlipRetrieval, input_image: Tensor) -> Tensor:
    """(B, 3, S, S) to image_embed (B, E)."""
    return blip.image_embed(blip.image_feat(input_image))


def image(blip: BlipRetrieval, input_image: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) to image_embed (B, E) and image_feat (B, T, D), in one pass of the ViT."""
    feat = blip.image_feat(input_image)
    return blip.image_embed(feat), feat


def qformer(blip2: Blip2Retrieval, image_feat: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) to query_embed (B, Q, D) and image_embed (B, Q, E)."""
    queries = blip2.query_embed(image_feat)
    return queries, blip2.image_embed(queries)


def image_by_queries(blip2: Blip2Retrieval, input_image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) to query_embed (B, Q, D), image_embed (B, Q, E) and image_feat (B, T, D), in one pass of the ViT."""
    feat = blip2.image_feat(input_image)
    return *qformer(blip2, feat), feat


def text_feat(blip2: Blip2Retrieval, text_ids: Tensor, text_atten_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L) to text_feat (B, L, D) and text_feat_proj (B, L, E)."""
    feat = blip2.text_feat(text_ids, text_atten_mask)
    return feat, blip2.text_feat_proj(feat)


def multimodal(blip2: Blip2Retrieval, text_ids: Tensor, text_atten_mask: Tensor, image_feat: Tensor) -> Tensor:
    """Caption and picture, pair by pair: ids and mask (B, L), features (B, T, D) to multimodal_embed (B, Q, D)."""
    return blip2.multimodal_embed(text_ids, text_atten_mask, blip2.keys_values(image_feat))


def itm(model: Retrieval, text_ids: Tensor, text_atten_mask: Tensor, image_feat: Tensor) -> Tensor:
    """Caption and picture, pair by pair: ids and mask (B, L), features (B, T, D) to itm_logits (B, 2)."""
    return model.itm_logits(text_ids, text_atten_mask, model.keys_values(image_feat))


def itm_cached(model: Retrieval, text_ids: Tensor, text_atten_mask: Tensor, cross_kv: Tensor) -> Tensor:
    """B captions of ONE picture: ids and mask (B, L), cross_kv (1, 2 * layers, H, T, K) to itm_logits (B, 2)."""
    tensors = cross_kv.unbind(dim=1)  # 2 * layers of (1, H, T, K)
    kv = list(zip(tensors[::2], tensors[1::2], strict=True))
    return model.itm_logits(text_ids, text_atten_mask, kv, shared=True)


BLIP: Computations = {
    "text_embed": BlipRetrieval.text_embed,
    "image_embed": image_embed,
    "image_feat": BlipRetrieval.image_feat,
    "image": image,
    "image_kv": BlipRetrieval.image_kv,
    "itm": itm,
    "itm_cached": itm_cached,
}
BLIP2: Computations = {
    "text_embed": Blip2Retrieval.text_embed,
    "image_feat": Blip2Retrieval.image_feat,
    "qformer": qformer,
    "image": image_by_queries,
    "image_kv": Blip2Retrieval.image_kv,
    "itm": itm,
    "itm_cached": itm_cached,
    "text_feat": text_feat,
    "multimodal": multimodal,
}


class Graph(nn.Module):
    """One graph as the exporters want it. It borrows the model: only the weights that the function uses are exported."""

    def __init__(self, compute: Callable[..., Outputs], model: Model) -> None:
        super().__init__()
        self.compute = compute
        self.model = model

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.compute(self.model, *inputs)


def module_for(name: str, model: Model, static: bool = False) -> Graph:
    """The module that computes graph `name` of `model`, in eval mode; in its `static` form if it has one."""
    return Graph(_computations(model, static)[name], model).eval()


def _computations(model: Model, static: bool) -> Computations:
    if isinstance(model, Blip2Retrieval):
        return BLIP2
    return BLIP if isinstance(model, BlipRetrieval) else generation_graphs(model, static)

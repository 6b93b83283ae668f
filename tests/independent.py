"""BLIP's retrieval evaluation a second time, plainly, over transformers: what our chain is held against.

Written from salesforce/BLIP train_retrieval.py (`evaluation`, `itm_eval`) and data/utils.py. It shares with the product
the names of the weights and the token ids, and no other line: pictures are read with Pillow here, every caption is padded to
the full length, the similarity matrix is held whole, every pair is scored from the picture's features, twice when both
directions want it.

N pictures, M captions, E embedding, T image tokens, D width, L tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.blip import BlipRetrieval
from models.huggingface import huggingface_config, to_huggingface

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Evaluation:
    """Everything the evaluation computes on its way."""

    image_feat: np.ndarray  # (N, T, D)
    image_embed: np.ndarray  # (N, E)
    text_embed: np.ndarray  # (M, E)
    sims: np.ndarray  # (N, M)
    logits: dict[tuple[int, int], np.ndarray]  # (picture, caption) -> (2,)
    i2t: np.ndarray  # (N, M), -100 where not re-ranked
    t2i: np.ndarray  # (M, N)


def transformers_model(ours: BlipRetrieval) -> Any:
    """transformers' BlipForImageTextRetrieval with the weights of `ours`, its attention written out (eager)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        config = transformers.BlipConfig(**huggingface_config(ours.cfg), attn_implementation="eager")
        model = transformers.BlipForImageTextRetrieval(config).eval()
    model.load_state_dict(to_huggingface(ours.state_dict(), ours.cfg))
    return model


def read_pictures(paths: Sequence[Path], size: int) -> Tensor:
    """(N, 3, S, S): RGB, resized to a square with Pillow's bicubic, scaled to 0..1, normalised."""
    rows = []
    for path in paths:
        with Image.open(path) as file:
            square = file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255  # (3, S, S)
        rows.append((pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    return torch.stack(rows)


@torch.no_grad()
def evaluate(model: Any, pictures: Tensor, ids: Tensor, mask: Tensor, enc_id: int, k_test: int) -> Evaluation:
    """`evaluation` of the original: pictures (N, 3, S, S), ids and mask (M, L) with [CLS] first, padded to the full length.

    The original stops when k_test is larger than the set; here it is clamped to the set.
    """
    normalize = torch.nn.functional.normalize
    hidden = model.text_encoder(ids, attention_mask=mask, return_dict=True).last_hidden_state  # (M, L, D)
    text_embed = normalize(model.text_proj(hidden[:, 0]), dim=-1)  # (M, E)
    feat = torch.cat([model.vision_model(picture[None]).last_hidden_state for picture in pictures])  # (N, T, D)
    image_embed = normalize(model.vision_proj(feat[:, 0]), dim=-1)  # (N, E)
    sims = image_embed @ text_embed.T  # (N, M)

    enc = ids.clone()
    enc[:, 0] = enc_id
    logits: dict[tuple[int, int], np.ndarray] = {}

    def match(images: Tensor, texts: Tensor) -> Tensor:
        """ITM logits (C, 2) of C pairs."""
        seen = feat[images]  # (C, T, D)
        state = model.text_encoder(
            enc[texts],
            attention_mask=mask[texts],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            return_dict=True,
        ).last_hidden_state  # (C, L, D)
        found: Tensor = model.itm_head(state[:, 0])  # (C, 2)
        logits.update(zip(zip(images.tolist(), texts.tolist(), strict=True), found.numpy(), strict=True))
        return found

    i2t = torch.full(sims.shape, -100.0)
    for n, row in enumerate(sims):
        top_sim, top = row.topk(min(k_test, len(row)))
        i2t[n, top] = match(torch.full_like(top, n), top)[:, 1] + top_sim
    t2i = torch.full(sims.T.shape, -100.0)
    for m, row in enumerate(sims.T):
        top_sim, top = row.topk(min(k_test, len(row)))
        t2i[m, top] = match(top, torch.full_like(top, m))[:, 1] + top_sim
    arrays = feat.numpy(), image_embed.numpy(), text_embed.numpy(), sims.numpy()
    return Evaluation(*arrays, logits, i2t.numpy(), t2i.numpy())


def itm_eval(i2t: np.ndarray, t2i: np.ndarray, image_of_text: Sequence[int]) -> dict[str, float]:
    """`itm_eval` of the original, with LAVIS' agg_metrics. i2t (N, M), t2i (M, N)."""
    text_ranks = []
    for n, row in enumerate(i2t):
        order = np.argsort(row)[::-1].tolist()
        text_ranks.append(min(order.index(m) for m, image in enumerate(image_of_text) if image == n))
    image_ranks = [np.argsort(row)[::-1].tolist().index(image_of_text[m]) for m, row in enumerate(t2i)]
    result: dict[str, float] = {}
    for side, ranks in (("txt", text_ranks), ("img", image_ranks)):
        recalls = [100.0 * sum(rank < cut for rank in ranks) / len(ranks) for cut in (1, 5, 10)]
        result |= {f"{side}_r{cut}": value for cut, value in zip((1, 5, 10), recalls, strict=True)}
        result[f"{side}_r_mean"] = sum(recalls) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    result["agg_metrics"] = result["txt_r_mean"]
    return result

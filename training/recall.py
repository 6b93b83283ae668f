"""Recall of a model in training, on pictures held out: by the embeddings alone (ITC) and re-ranked (ITM).

Scores and metrics as salesforce/BLIP train_retrieval.py (`evaluation`, `itm_eval`), and as LAVIS has them for BLIP-2.
N pictures, M captions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.blip2 import Blip2Retrieval, Retrieval
from models.spec import MATCH
from training.data import CaptionedPictures, led_by, normalised
from training.gather import rank

EXCLUDED = -100.0  # the score of a pair that is not among the k best
BLOCK = 256  # pictures or captions at a time, unless it is said


@torch.inference_mode()
def recall(model: Retrieval, data: CaptionedPictures, encode_id: int, rows: int = BLOCK) -> dict[str, float]:
    """Percent. txt_r1: pictures that find one of their captions first; img_r1: captions that find their picture first;
    and so on for 5 and 10. The same with `itc_` before it for the embeddings alone.

    `rows` pictures or captions are embedded at a time; features of pictures wait in the memory of the CPU, as in LAVIS: those of
    COCO's 5,000 are 19 GB at 364 pixels.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    feats = torch.cat(
        [
            model.image_feat(torch.from_numpy(normalised(data.pixels[i : i + rows], model.cfg)).to(device)).cpu()
            for i in range(0, len(data), rows)
        ]
    )
    ids, mask = (torch.from_numpy(x).to(device) for x in data.captions(np.arange(len(data.ids))))  # (M, L)
    text_embed = torch.cat([model.text_embed(ids[i : i + rows], mask[i : i + rows]) for i in range(0, len(ids), rows)])
    sims = similarities(model, feats, text_embed, rows)  # (N, M)
    to_text, to_image = reranked(model, feats, led_by(ids, encode_id), mask, sims)
    model.train(was_training)
    itc = ranks(sims.cpu().numpy(), sims.cpu().numpy(), data.image_of_text)
    return {**ranks(to_text, to_image, data.image_of_text), **{f"itc_{name}": value for name, value in itc.items()}}


def similarities(model: Retrieval, feats: Tensor, text_embed: Tensor, rows: int = BLOCK) -> Tensor:
    """(N, M); of BLIP-2's queries the one that fits the caption best counts (LAVIS compute_sim_matrix)."""
    blocks = (feats[i : i + rows].to(text_embed.device) for i in range(0, len(feats), rows))  # (n, T, D)
    if not isinstance(model, Blip2Retrieval):
        return torch.cat([model.image_embed(block) @ text_embed.t() for block in blocks])
    queries = (model.image_embed(model.query_embed(block)) for block in blocks)  # (n, Q, E)
    return torch.cat([(block @ text_embed.t()).amax(dim=1) for block in queries])


def reranked(model: Retrieval, feats: Tensor, ids: Tensor, mask: Tensor, sims: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, M) of pictures to captions and of captions to pictures, each over its own k best by `sims`."""
    k = model.cfg.protocol.k_test
    among_texts = torch.zeros_like(sims, dtype=torch.bool).scatter_(1, sims.topk(min(k, sims.shape[1]), dim=1).indices, True)
    among_images = torch.zeros_like(among_texts).scatter_(0, sims.topk(min(k, sims.shape[0]), dim=0).indices, True)
    scores = torch.full_like(sims, EXCLUDED)
    bar = tqdm(among_texts | among_images, "re-ranked", leave=False, unit=" pictures", disable=None if rank() == 0 else True)
    for image, wanted in enumerate(bar):
        texts = wanted.nonzero()[:, 0]
        kv = model.keys_values(feats[image : image + 1].to(sims.device))
        logits = model.itm_logits(ids[texts], mask[texts], kv, shared=True)  # (texts, 2)
        scores[image, texts] = logits[:, MATCH] + sims[image, texts]
    to_text, to_image = scores.masked_fill(~among_texts, EXCLUDED), scores.masked_fill(~among_images, EXCLUDED)
    return to_text.cpu().numpy(), to_image.cpu().numpy()


def ranks(to_text: np.ndarray, to_image: np.ndarray, image_of_text: np.ndarray) -> dict[str, float]:
    """`itm_eval` of salesforce/BLIP train_retrieval.py: the place of the best-placed right answer, as recall at 1, 5, 10.

    Both scores are (N, M). Of equal ones the higher index comes first, as in postprocess/recall.py.
    """
    images = np.arange(len(to_text))
    right = image_of_text[None, :] == images[:, None]  # (N, M)
    found = {
        "txt": np.take_along_axis(right, np.argsort(to_text, axis=1, kind="stable")[:, ::-1], axis=1).argmax(1),  # (N,)
        "img": np.take_along_axis(right, np.argsort(to_image, axis=0, kind="stable")[::-1], axis=0).argmax(0),  # (M,)
    }
    return {f"{name}_r{k}": float(100 * (place < k).mean()) for name, place in found.items() for k in (1, 5, 10)}

"""Recall of both directions, as `itm_eval` of salesforce/BLIP train_retrieval.py defines it, from sparse pairs.

In: the re-ranked pairs and the embeddings of an outputs/ folder, and the picture each caption was written for.
Out: for each query the rank of its first right answer, and the percentages that follow from the ranks. The scores of
all pictures against all captions never exist at once.

Axes: N pictures, M captions, P pairs. Seen from one direction: Q queries, I items. Ranks count from 0.

Equal scores: the item with the higher index comes first. The original orders by `np.argsort(score)[::-1]`, and this is
what a stable sort makes of it; a model that scores everything alike gets the chance level, not 100.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.errors import UserError
from runtime.outputs import I2T, T2I, RetrievalOutputs, scores
from runtime.similarity import blocks

CUTS = (1, 5, 10)  # recall is stated at these
NOT_FOUND = int(np.iinfo(np.int64).max)  # rank of an answer that was not among the re-ranked candidates
NO_ANSWER = -1  # rank of a query that has no right answer: a picture without captions
NOT_SCORED = -100.0  # what the original's matrices hold where a pair was not re-ranked
DENSE_CELLS = 100_000_000  # score_matrices makes no larger matrix: 400 MB
BLOCK_CELLS = 1 << 22  # similarities held at once: 16 MiB

Metrics = dict[str, float]  # percent, by the original's names: txt_r1 .. agg_metrics

ASCEND_KEYS = {"txt": "text", "img": "image"}  # the retrieval recipe of the Ascend ModelZoo; it has no agg_metrics


@dataclass(frozen=True)
class Pairs:
    """The re-ranked pairs of one direction: each query against its candidates."""

    query: np.ndarray  # (P,) int
    item: np.ndarray  # (P,) int
    score: np.ndarray  # (P,) float
    query_image: np.ndarray  # (Q,) int: the picture that the query is, or was written for
    item_image: np.ndarray  # (I,) int: the same of the items


@dataclass(frozen=True)
class Ranking:
    """Rank of the first right answer of every query: its best caption (txt), its picture (img)."""

    txt: np.ndarray  # (N,) int64
    img: np.ndarray  # (M,) int64


@dataclass(frozen=True)
class Assessment:
    """How well the pictures and captions of a data set find one another."""

    reranked: Ranking  # by ITM logit plus similarity, among the candidates
    itc: Ranking  # by similarity alone, among all
    chance: Metrics  # expected of a random order
    pairs_i2t: Pairs
    pairs_t2i: Pairs


def assess(outputs: RetrievalOutputs, image_of_text: np.ndarray) -> Assessment:
    """Rank everything. `image_of_text` (M,) int64 names the picture of each caption."""
    i2t, t2i = directions(outputs, image_of_text)
    images, texts = outputs.image_embed[:], outputs.text_embed[:]  # (N, E) or (N, Q, E), (M, E)
    pictures = np.arange(len(images))
    itc = Ranking(
        itc_ranks(images, texts, pictures, image_of_text),
        itc_ranks(texts, images, image_of_text, pictures),
    )
    return Assessment(Ranking(ranks(i2t), ranks(t2i)), itc, chance(image_of_text, len(images)), i2t, t2i)


def directions(outputs: RetrievalOutputs, image_of_text: np.ndarray) -> tuple[Pairs, Pairs]:
    """The pairs as the pictures see them (i2t) and as the captions see them (t2i)."""
    score, direction = scores(outputs), outputs.pair_direction[:]  # (P,), (P,)
    image, text = outputs.pair_image[:], outputs.pair_text[:]  # (P,), (P,)
    pictures = np.arange(len(outputs.image_embed))
    i2t, t2i = (direction & I2T) > 0, (direction & T2I) > 0
    return (
        Pairs(image[i2t], text[i2t], score[i2t], pictures, image_of_text),
        Pairs(text[t2i], image[t2i], score[t2i], image_of_text, pictures),
    )


def ranks(pairs: Pairs) -> np.ndarray:
    """(Q,) int64: rank of the best right item among each query's candidates.

    NOT_FOUND when none of its right items is a candidate; the original gives such an item -100, below every candidate.
    So recall at k is the original's whenever k <= k_test. Beyond that (R@10 with k_test below 10) the original counts
    whichever of the items tied at -100 its unstable sort puts first; here they count as not found.

    Linear in P: two scatters and a count, no sort.
    """
    query, item, score = pairs.query, pairs.item, pairs.score
    right = pairs.query_image[query] == pairs.item_image[item]  # (P,)
    best = np.full(len(pairs.query_image), -np.inf, score.dtype)  # (Q,) score of the best right item
    np.maximum.at(best, query[right], score[right])
    target = best[query]  # (P,)
    level = score == target
    last = np.full(len(best), -1, np.int64)  # (Q,) among equals the right item with the highest index
    np.maximum.at(last, query[right & level], item[right & level])
    ahead = (score > target) | (level & (item > last[query]))
    rank = np.bincount(query[ahead], minlength=len(best)).astype(np.int64)  # (Q,)
    rank[last < 0] = NOT_FOUND
    rank[~np.isin(pairs.query_image, pairs.item_image)] = NO_ANSWER
    return rank


def itc_ranks(
    query: np.ndarray, item: np.ndarray, query_image: np.ndarray, item_image: np.ndarray, cells: int = BLOCK_CELLS
) -> np.ndarray:
    """(Q,) int64: rank of the best right item by similarity alone, among all I items.

    query (Q, E) and item (I, E) are embeddings; BLIP-2's of pictures have an axis more. The similarities are made in
    blocks of queries, at most `cells` at once (one query's I when that is more). Equal captions have equal similarities
    but for the rounding of the matrix product.
    """
    column = np.arange(len(item), dtype=np.int32)
    rank = np.empty(len(query), np.int64)
    for block, sim in blocks(query, item, 4 * cells):  # (B, I)
        right = query_image[block, None] == item_image  # (B, I)
        best = np.where(right, sim, -np.inf).max(1, keepdims=True)  # (B, 1)
        level = sim == best
        last = np.where(right & level, column, -1).max(1, keepdims=True)  # (B, 1)
        rank[block] = np.count_nonzero((sim > best) | (level & (column > last)), axis=1)
    rank[~np.isin(query_image, item_image)] = NO_ANSWER
    return rank


def recall_at(rank: np.ndarray, k: int) -> float:
    """Percent of the queries whose first right answer is among their first k. Queries without an answer do not count.

    Raises ValueError when no query is left.
    """
    asked = np.count_nonzero(rank != NO_ANSWER)
    if not asked:
        raise ValueError("recall of no queries")
    return float(100.0 * np.count_nonzero((rank >= 0) & (rank < k)) / asked)


def curve(rank: np.ndarray, most: int) -> list[float]:
    """Recall at 1, 2, ... `most`, in percent."""
    return [recall_at(rank, k) for k in range(1, most + 1)]


def metrics(ranking: Ranking) -> Metrics:
    """Percent under the original's names; agg_metrics is txt_r_mean, as LAVIS and mindformers have it."""
    return _named([recall_at(ranking.txt, k) for k in CUTS], [recall_at(ranking.img, k) for k in CUTS])


def chance(image_of_text: np.ndarray, pictures: int) -> Metrics:
    """What a random order of all candidates is expected to reach, in percent.

    A picture with c of the M captions misses at k with probability C(M - c, k) / C(M, k); a caption finds its picture
    with k / N.
    """
    total = len(image_of_text)
    own = np.bincount(image_of_text, minlength=pictures)
    own = own[own > 0]  # (pictures with captions,)
    txt = []
    for k in CUTS:
        drawn = np.arange(min(k, total))  # captions drawn before, without putting back
        missed = np.clip((total - own[:, None] - drawn) / (total - drawn), 0, 1).prod(1)
        txt.append(100.0 * float(1 - missed.mean()))
    return _named(txt, [100.0 * min(k / pictures, 1.0) for k in CUTS])


def rename(values: Metrics, keys: str) -> Metrics:
    """The same numbers under the names of `keys`: "blip" (txt_r1 ...) or "ascend" (text_r1 ..., image_r1 ..., r_mean)."""
    if keys == "blip":
        return dict(values)
    found = {}
    for name, value in values.items():
        side, _, rest = name.partition("_")
        if side in ASCEND_KEYS:
            found[f"{ASCEND_KEYS[side]}_{rest}"] = value
        elif name == "r_mean":
            found[name] = value
    return found


def score_matrices(outputs: RetrievalOutputs) -> tuple[np.ndarray, np.ndarray]:
    """The original's two dense matrices, i2t (N, M) and t2i (M, N) float32, -100 where a pair was not re-ranked.

    For small sets and for tests; the metrics never need them. Raises UserError above DENSE_CELLS cells.
    """
    images, texts = len(outputs.image_embed), len(outputs.text_embed)
    if images * texts > DENSE_CELLS:
        raise UserError(
            f"A score matrix of {images:,} pictures and {texts:,} captions has {images * texts:,} cells, at most "
            f"{DENSE_CELLS:,} are made. Work on the pairs instead: postprocess.recall.directions."
        )
    matrices = []
    for pairs, shape in zip(directions(outputs, np.zeros(texts, np.int64)), ((images, texts), (texts, images)), strict=True):
        matrix = np.full(shape, NOT_SCORED, np.float32)
        matrix[pairs.query, pairs.item] = pairs.score
        matrices.append(matrix)
    return matrices[0], matrices[1]


def _named(txt: list[float], img: list[float]) -> Metrics:
    named = {}
    for side, values in (("txt", txt), ("img", img)):
        named.update({f"{side}_r{k}": value for k, value in zip(CUTS, values, strict=True)})
        named[f"{side}_r_mean"] = sum(values) / len(values)
    named["r_mean"] = (named["txt_r_mean"] + named["img_r_mean"]) / 2
    named["agg_metrics"] = named["txt_r_mean"]
    return named

"""training/losses.py against plain re-computations, one pair and one word at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.blip import BlipPretrain
from models.spec import MATCH
from tests.tiny import TINY, fill
from training import losses

B, L = 4, 7
# Sums of at most 60 terms in float32: 5e-7 was the largest difference seen.
EXACT = 3e-6


@pytest.fixture
def model() -> BlipPretrain:
    model = BlipPretrain(TINY)
    fill(model, 0, 0.2)
    return model.requires_grad_(False)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    image = torch.randn(B, 3, 32, 32, generator=random)
    ids = torch.randint(5, 60, (B, L), generator=random)
    mask = torch.ones(B, L, dtype=torch.int64)
    for row, length in enumerate((7, 4, 3, 6)):
        mask[row, length:] = 0
    return image, ids * mask, mask


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def test_itc_is_the_mean_of_both_cross_entropies() -> None:
    sims = torch.randn(B, B, generator=torch.Generator().manual_seed(0)) * 3
    rows = [-log_softmax(sims[n].tolist())[n] for n in range(B)]
    columns = [-log_softmax(sims[:, n].tolist())[n] for n in range(B)]
    want = (sum(rows) / B + sum(columns) / B) / 2
    assert float(losses.itc(sims, sims.t(), torch.eye(B))) == pytest.approx(want, abs=EXACT)


def test_itc_shares_the_target_between_captions_of_one_picture() -> None:
    sims = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    half = -sum(log_softmax(sims[n].tolist())[m] / 2 for n in (0, 1) for m in (0, 1))
    halves = -sum(log_softmax(sims[:, n].tolist())[m] / 2 for n in (0, 1) for m in (0, 1))
    last = -log_softmax(sims[2].tolist())[2] - log_softmax(sims[:, 2].tolist())[2]
    assert float(losses.itc(sims, sims.t(), losses.shared_targets(same))) == pytest.approx((half + halves + last) / 6, abs=EXACT)


def test_negatives_are_drawn_by_similarity_and_never_of_the_same_picture() -> None:
    sims = torch.tensor([[9.0, 2.0, 2.0, -30.0], [0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    same = torch.eye(4, dtype=torch.bool)
    same[1, 2] = same[2, 1] = True  # captions of one picture
    random = torch.Generator().manual_seed(0)
    drawn = torch.stack([losses.hard_negatives(sims, same, random) for _ in range(2000)])  # (2000, 4)
    assert not any(same[row, column] for row in range(4) for column in drawn[:, row].unique())
    counts = torch.bincount(drawn[:, 0], minlength=4) / 2000
    # softmax([9, 2, 2, -30]) gives 9e-4 to the two likely ones; FLOOR adds 1e-4 to each, so the unlikely one gets 0.047.
    weights = sims[0].softmax(0) + losses.FLOOR
    want = weights[1:] / weights[1:].sum()
    torch.testing.assert_close(counts[1:], want, atol=0.04, rtol=0)  # four standard deviations of 2000 draws
    assert counts[3] > 0


def test_a_batch_of_one_has_no_negatives() -> None:
    drawn = losses.hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.Generator())
    assert drawn.tolist() == [-1]
    # The loss says so itself when similarities are no numbers; drawing must not stop before it does.
    assert losses.hard_negatives(torch.full((2, 2), math.nan), torch.eye(2, dtype=torch.bool), torch.Generator()).tolist() == [
        -1,
        -1,
    ]


def test_itm_scores_each_pair_by_itself(model: BlipPretrain, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    image, ids, mask = batch
    feat = model.image_feat(image)
    negative_image, negative_text = torch.tensor([1, 0, 3, -1]), torch.tensor([2, -1, 0, 1])
    pairs = [(n, n, MATCH) for n in range(B)]  # text, image, label
    pairs += [(n, int(i), 1 - MATCH) for n, i in enumerate(negative_image) if i >= 0]
    pairs += [(int(t), n, 1 - MATCH) for n, t in enumerate(negative_text) if t >= 0]
    terms = []
    for text, picture, label in pairs:
        words = int(mask[text].sum())  # without padding at all
        kv = model.text_encoder.image_kv(feat[picture : picture + 1])
        logits = model.itm_logits(ids[text : text + 1, :words], mask[text : text + 1, :words], kv)
        terms.append(-log_softmax(logits[0].tolist())[label])
    found = losses.itm(model, ids, mask, feat, model.keys_values(feat), negative_image, negative_text)
    assert len(terms) == B + 3 + 3
    assert float(found) == pytest.approx(sum(terms) / len(terms), abs=EXACT)


def test_lm_smooths_and_leaves_padding_out(model: BlipPretrain, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    image, ids, mask = batch
    feat = model.image_feat(image)
    terms = []
    for row in range(B):
        words = int(mask[row].sum())
        kv = model.text_encoder.image_kv(feat[row : row + 1])
        logits = model.text_decoder(ids[row : row + 1, :words], mask[row : row + 1, :words], kv)[0]  # (words, vocab)
        for place in range(words - 1):
            scores = log_softmax(logits[place].tolist())
            right = scores[int(ids[row, place + 1])]
            terms.append(-(0.9 * right + 0.1 * sum(scores) / len(scores)))
    found = losses.lm(model.text_decoder(ids, mask, model.keys_values(feat)), ids, mask)
    assert len(terms) == 7 + 4 + 3 + 6 - B
    assert float(found) == pytest.approx(sum(terms) / len(terms), abs=EXACT)


def test_lm_does_not_look_ahead(model: BlipPretrain, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    image, ids, mask = batch
    kv = model.text_encoder.image_kv(model.image_feat(image)[:1])
    other = ids[:1].clone()
    other[0, 4:] = 5
    a, b = (model.text_decoder(x, mask[:1], kv)[0] for x in (ids[:1], other))
    torch.testing.assert_close(a[:4], b[:4], atol=0, rtol=0)
    assert not torch.equal(a[4:], b[4:])


def test_the_comparisons_can_fail(model: BlipPretrain, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """A single wrong word, or one pair more, moves the losses by far more than EXACT."""
    image, ids, mask = batch
    feat = model.image_feat(image)
    kv = model.keys_values(feat)
    other = ids.clone()
    other[1, 2] = 5
    right, wrong = (losses.lm(model.text_decoder(words, mask, kv), words, mask) for words in (ids, other))
    assert abs(float(right - wrong)) > 100 * EXACT
    none = torch.full((B,), -1)
    one = torch.tensor([1, -1, -1, -1])
    few, more = (losses.itm(model, ids, mask, feat, kv, negative_image, none) for negative_image in (none, one))
    assert abs(float(few - more)) > 100 * EXACT

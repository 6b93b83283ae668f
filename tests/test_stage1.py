"""The losses of BLIP-2's first stage against plain re-computations, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.blip2 import Blip2Stage1
from models.config import EVA, Blip2Config, Protocol, QformerConfig, VisionConfig
from models.spec import MATCH
from preprocess.text import CaptionTokenizer
from tests.chain import TOKENS
from tests.test_blip2_models import plainly
from tests.test_losses import log_softmax
from tests.tiny import TINY2, random_stage1
from training import stage1
from training.initial import initialise
from training.optimizer import make_optimizer, set_learning_rate
from training.settings import Model, Optimizer
from training.start import freeze
from training.step import Batch, Step

TOKENIZER = Path(__file__).parent.parent / "demo" / "tokenizer"
SMALL = Blip2Config(
    VisionConfig(image_size=16, patch=8, width=16, depth=1, heads=2, mlp=32, kind=EVA),
    QformerConfig(vocab=84, width=16, depth=2, heads=2, ffn=32, positions=35, queries=3),
    embed=8,
    protocol=Protocol(encode_token="[CLS]", k_test=4),
)
# Means of at most 59 terms in float32: on 20 models with 4 batches each 1.2e-6 was the largest difference seen.
EXACT = 3e-6


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> CaptionTokenizer:
    """The tokenizer of TINY2."""
    file = tmp_path_factory.mktemp("words") / "vocab.txt"
    file.write_text("\n".join(TOKENS) + "\n", "utf-8")
    return CaptionTokenizer.load(file, TINY2)


def batch_of(pictures: list[int], lengths: list[int], seed: int = 0) -> Batch:
    """Random pictures, and captions of these lengths with [CLS] first. What has one number is taken for one picture."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(len(pictures), 3, 32, 32, generator=random)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, TINY2.text.vocab - 1, mask.shape, generator=random) * mask
    ids[:, 0] = TOKENS.index("[CLS]")
    return Batch(torch.tensor(pictures), image, ids, mask)


def found(model: Blip2Stage1, words: CaptionTokenizer, batch: Batch, matching: bool = True) -> Step:
    return stage1.losses_of(model, words, batch, torch.Generator().manual_seed(7), matching)


# --- the losses, plainly: one picture, one caption, one word at a time, in Python's own numbers ---------------------------


def unpadded(batch: Batch, text: int) -> tuple[Tensor, Tensor]:
    words = int(batch.mask[text].sum())
    return batch.ids[text : text + 1, :words], batch.mask[text : text + 1, :words]


def plain_sims(model: Blip2Stage1, batch: Batch, choose: Callable[[list[float]], float] = max) -> list[list[float]]:
    """Pictures by captions, of the query that fits best."""
    rows = []
    for picture in batch.image:
        queries = model.image_embed(model.query_embed(model.image_feat(picture[None])))[0]  # (Q, E)
        texts = [model.text_embed(*unpadded(batch, text))[0] for text in range(len(batch.ids))]
        rows.append([choose([float(query @ text) for query in queries]) / float(model.temp) for text in texts])
    return rows


def plain_itc(sims: list[list[float]], pictures: list[int], smoothing: float = 0.1) -> float:
    count, total = len(sims), 0.0
    for rows in (sims, [list(column) for column in zip(*sims, strict=True)]):
        for row, own in zip(rows, pictures, strict=True):
            shared = pictures.count(own)
            for score, other in zip(log_softmax(row), pictures, strict=True):
                total -= ((1 - smoothing) * (other == own) / shared + smoothing / count) * score
    return total / (2 * count)


def plain_itm(model: Blip2Stage1, batch: Batch, wrong_image: list[int], wrong_text: list[int]) -> tuple[float, Tensor]:
    """The loss, and the logits of all pairs: right ones, captions with a wrong picture, pictures with a wrong caption."""
    own = range(len(batch.ids))
    pairs = [*((n, n, MATCH) for n in own), *((n, wrong_image[n], 0) for n in own), *((wrong_text[n], n, 0) for n in own)]
    rows = []
    for text, picture, _ in pairs:
        kv = model.keys_values(model.image_feat(batch.image[picture : picture + 1]))
        rows.append(model.itm_logits(*unpadded(batch, text), kv)[0])
    terms = [-log_softmax(row.tolist())[label] for row, (_, _, label) in zip(rows, pairs, strict=True)]
    return sum(terms) / len(terms), torch.stack(rows)


def plain_lm(model: Blip2Stage1, batch: Batch, decode_id: int) -> float:
    terms = []
    for n, picture in enumerate(batch.image):
        ids, mask = unpadded(batch, n)
        led = ids.clone()
        led[0, 0] = decode_id
        logits = plainly(model, model.image_feat(picture[None]), led, mask)[1][0]  # (words, vocab)
        for row, word in zip(logits[:-1], ids[0, 1:], strict=True):
            scores = log_softmax(row.tolist())
            terms.append(-(0.9 * scores[int(word)] + 0.1 * sum(scores) / len(scores)))
    return sum(terms) / len(terms)


def plain_negatives(sims: list[list[float]], pictures: list[int]) -> list[list[int]]:
    """Wrong pictures for the captions, then wrong captions for the pictures, drawn as `found` draws them."""
    generator, drawn = torch.Generator().manual_seed(7), []
    for rows in ([list(column) for column in zip(*sims, strict=True)], sims):
        weights = [[math.exp(score) + 1e-4 for score in log_softmax(row)] for row in rows]
        allowed = [
            [w * (other != own) for w, other in zip(row, pictures, strict=True)]
            for row, own in zip(weights, pictures, strict=True)
        ]
        drawn.append(torch.multinomial(torch.tensor(allowed), 1, generator=generator)[:, 0].tolist())
    return drawn


SEVERAL = [[0, 1, 2, 3], [0, 1, 2, 1, 3]]  # the second has a picture twice, with two captions


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pictures", SEVERAL, ids=["all different", "one twice"])
def test_losses_are_those_of_each_pair(
    pictures: list[int], seed: int, words: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = random_stage1(seed=seed), batch_of(pictures, [7, 4, 3, 6, 5][: len(pictures)], seed)
    seen, plain = [], Blip2Stage1.itm_logits
    monkeypatch.setattr(Blip2Stage1, "itm_logits", lambda *arguments: seen.append(plain(*arguments)) or seen[-1])
    step = found(model, words, batch)
    monkeypatch.undo()

    sims = plain_sims(model, batch)
    assert float(step.itc) == pytest.approx(plain_itc(sims, pictures), abs=EXACT)
    wrong_image, wrong_text = plain_negatives(sims, pictures)
    assert all(pictures[n] != pictures[wrong] for drawn in (wrong_image, wrong_text) for n, wrong in enumerate(drawn))
    itm, logits = plain_itm(model, batch, wrong_image, wrong_text)
    assert float((seen[0] - logits).abs().max()) < 3e-5  # as tests/test_blip2_models.py has it
    assert float(step.itm) == pytest.approx(itm, abs=EXACT)
    assert float(step.lm) == pytest.approx(plain_lm(model, batch, words.decode_id), abs=EXACT)
    assert float(step.total) == pytest.approx(float(step.itc) + float(step.itm) + float(step.lm))


def test_the_comparisons_can_fail(words: CaptionTokenizer) -> None:
    """No smoothing, no shared targets, the first query, other negatives, [CLS] in place of [DEC]: each is seen."""
    pictures = SEVERAL[1]
    model, batch = random_stage1(), batch_of(pictures, [7, 4, 3, 6, 5])
    step, sims = found(model, words, batch), plain_sims(model, batch)
    wrong_image, wrong_text = plain_negatives(sims, pictures)
    wrong = {
        "smoothing": plain_itc(sims, pictures, smoothing=0.0) - float(step.itc),
        "shared targets": plain_itc(sims, list(range(5))) - float(step.itc),
        "query": plain_itc(plain_sims(model, batch, lambda scores: scores[0]), pictures) - float(step.itc),
        "groups": plain_itm(model, batch, wrong_text, wrong_image)[0] - float(step.itm),
        "first word": plain_lm(model, batch, words.encode_id) - float(step.lm),
    }
    assert min(map(abs, wrong.values())) > 100 * EXACT, wrong


def test_without_matching_the_other_losses_stay(words: CaptionTokenizer) -> None:
    model, batch = random_stage1(), batch_of([0, 1, 2], [7, 4, 3])
    a, b = (found(model, words, batch, matching) for matching in (True, False))
    assert (float(b.itm), float(b.itc), float(b.lm)) == (0, float(a.itc), float(a.lm))
    assert float(a.itm) > 0.1


@pytest.mark.parametrize("pictures", [[0], [0, 0]], ids=["one pair", "one picture with two captions"])
def test_without_a_wrong_pair_each_is_its_own(pictures: list[int], words: CaptionTokenizer) -> None:
    """LAVIS fails on one pair; mindformers' figures of it are ITC 0 and an ITM with the pair as its own negatives."""
    model, batch = random_stage1(), batch_of(pictures, [7, 4][: len(pictures)])
    step, own = found(model, words, batch), list(range(len(pictures)))
    assert float(step.itc) == pytest.approx(0 if len(pictures) == 1 else plain_itc(plain_sims(model, batch), pictures), abs=EXACT)
    assert float(step.itm) == pytest.approx(plain_itm(model, batch, own, own)[0], abs=EXACT)
    assert float(step.lm) == pytest.approx(plain_lm(model, batch, words.decode_id), abs=EXACT)
    assert float(step.total) == pytest.approx(float(step.itc + step.itm + step.lm))


# --- training ---------------------------------------------------------------------------------------------------------


def fresh(cfg: Blip2Config = SMALL, seed: int = 0) -> Blip2Stage1:
    model = Blip2Stage1(cfg)
    initialise(model, seed)
    return model


def test_the_queries_start_as_the_text(words: CaptionTokenizer) -> None:
    model = fresh(TINY2)
    for layer in model.Qformer.bert.encoder:
        for ours, text in ((layer.intermediate_query, layer.intermediate), (layer.output_query, layer.output)):
            for name, tensor in text.state_dict().items():
                assert torch.equal(ours.state_dict()[name], tensor)
                assert ours.state_dict()[name].data_ptr() != tensor.data_ptr()  # a copy, which training moves apart
    assert len({tuple(query.tolist()) for query in model.query_tokens[0]}) == TINY2.qformer.queries
    again, other = fresh(TINY2), fresh(TINY2, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.query_tokens, other.query_tokens)


def test_gradients_reach_everything_but_a_frozen_image_encoder(words: CaptionTokenizer) -> None:
    model, batch = random_stage1(), batch_of([0, 1, 2], [7, 4, 3])
    freeze(model, Model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model, Optimizer())
    set_learning_rate(optimizer, 1e-3)
    found(model, words, batch).total.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name in before if name.startswith("visual_encoder.")}
    nothing = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert nothing == set()
    optimizer.step()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == without

"""Batches: the same for any number of workers and after a stop, decoded as the original decodes, clean when closed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import Misuse, UserError
from preprocess.images import open_rgb
from preprocess.text import CaptionTokenizer
from training import loader
from training.loader import Draw, Encoded, Loaded, Planned, load, open_encoded, planned, tokenised
from training.order import PICTURE, START, Order, Position, randomness
from training.sources import Part, Samples
from training.transforms import RandAugment, Transform

PICTURES, CAPTIONS, SIZE = 9, 3, 16
TRANSFORMS = (Transform(SIZE), Transform(SIZE, crop_scale=(0.2, 1.0), rand_augment=RandAugment(), shift=2))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Two parts: pictures 0 to 3 with each of their captions, and 4 to 8 with one of them."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for n in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (20 + n, 25, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    own = [(n, (f"{n} {c}",)) for n in range(4) for c in range(CAPTIONS)]
    drawn = [(n, tuple(f"{n} {c}" for c in range(CAPTIONS))) for n in range(4, PICTURES)]
    texts = tuple(texts for _, texts in own + drawn)
    pictures = tuple(folder / f"{n}.png" for n in range(PICTURES))
    return Samples(
        pictures, np.array([n for n, _ in own + drawn]), texts, (Part("own", len(own)), Part("drawn", len(drawn), 2.0))
    )


def order(samples: Samples, batchsize: int = 5) -> Order:
    return Order(samples.parts, batchsize, seed=3)


def taken(samples: Samples, count: int, workers: int = 0, start: Position = START, **others: int) -> list[Loaded]:
    plan = planned(samples, order(samples), TRANSFORMS, start)
    with closing(load(plan, workers, **others)) as batches:
        return list(islice(batches, count))


def assert_same(one: list[Loaded], other: list[Loaded]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.position, a.texts, a.answers) == (b.position, b.texts, b.answers)
        np.testing.assert_array_equal(a.picture, b.picture)
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_a_batch_is_what_the_order_and_the_transforms_say(samples: Samples) -> None:
    wanted = order(samples)
    for batch, (position, draws) in zip(taken(samples, 9), wanted.batches(), strict=False):
        assert batch.position == position
        assert batch.pixels.shape == (5, 3, SIZE, SIZE)
        assert batch.pixels.dtype == np.uint8
        for row, draw in enumerate(draws):
            n = draw % wanted.count
            picture = samples.picture[n]
            assert batch.picture[row] == picture
            assert batch.texts[row] in samples.texts[n]
            transform = TRANSFORMS[0 if picture < 4 else 1]
            pixels = transform(open_rgb(samples.pictures[picture]), randomness(PICTURE, 3, position.epoch, int(draw)))
            np.testing.assert_array_equal(batch.pixels[row], pixels)


def test_captions_and_crops_differ_from_epoch_to_epoch(samples: Samples) -> None:
    batches = taken(samples, order(samples, 5).batches_per_epoch * 12)
    captions = {text for batch in batches for text in batch.texts}
    assert captions == {f"{n} {c}" for n in range(PICTURES) for c in range(CAPTIONS)}
    crops = {batch.pixels[row].tobytes() for batch in batches for row in np.flatnonzero(batch.picture == 8)}
    assert len(crops) > 15


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(samples: Samples, workers: int) -> None:
    assert_same(taken(samples, 8, workers), taken(samples, 8))


@pytest.mark.parametrize("prefetch", [1, 4])
def test_how_much_is_made_ahead_changes_nothing(samples: Samples, prefetch: int) -> None:
    assert_same(taken(samples, 5, prefetch=prefetch), taken(samples, 5))


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_after_a_stop_come_the_batches_that_were_left(samples: Samples, stop: int) -> None:
    whole = taken(samples, 9)
    assert_same(taken(samples, 8 - stop, start=order(samples).after(whole[stop].position)), whole[stop + 1 :])


def test_processes_see_the_batch_of_one(samples: Samples) -> None:
    alone = list(islice(load(planned(samples, order(samples, 6), TRANSFORMS)), 4))
    parts = [list(islice(load(planned(samples, order(samples, 6), TRANSFORMS, rank=rank, ranks=2)), 4)) for rank in range(2)]
    for whole, first, second in zip(alone, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([first.pixels, second.pixels]), whole.pixels)
        assert first.texts + second.texts == whole.texts


def test_pieces_hold_what_is_to_be_made_ahead() -> None:
    """Each worker has AHEAD pieces at a time; together they are `prefetch` batches, and never more than AHEAD."""
    draw = Draw(Path(), TRANSFORMS[0], (0, 0, 0), 0, "")

    def sizes(batchsize: int, prefetch: int) -> list[int]:
        plan = iter([Planned(Position(0, n), (draw,) * batchsize) for n in range(2)])
        found = list(loader._pieces(plan, prefetch))
        assert [piece.last for piece in found] == ([False] * (len(found) // 2 - 1) + [True]) * 2
        return [len(piece.draws) for piece in found]

    assert sizes(100, 2) == [50, 50] * 2
    assert sizes(100, 1) == [25] * 8
    assert sizes(100, 9) == [100] * 2
    assert sizes(3, 1) == [1] * 6
    assert sizes(7, 2) == [4, 3] * 2


def test_nothing_is_planned_far_ahead(samples: Samples) -> None:
    """The plan has no end: it is asked for no more than the workers can hold."""
    asked = []

    def plan() -> Iterator[Planned]:
        for batch in planned(samples, order(samples), TRANSFORMS):
            asked.append(batch.position)
            yield batch

    with closing(load(plan(), 2, prefetch=2)) as batches:
        list(islice(batches, 3))
    assert len(asked) <= 3 + 2 * 2 + 1


def test_closing_stops_the_workers(samples: Samples) -> None:
    batches = load(planned(samples, order(samples), TRANSFORMS), 2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    started = time.monotonic()
    batches.close()
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named(samples: Samples, tmp_path: Path, workers: int) -> None:
    whole = samples.pictures[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    broken = Samples((tmp_path / "cut.png",), np.zeros(4, np.int64), (("a",),) * 4, (Part("cut", 4),))
    with pytest.raises(UserError, match=r"cut.png cannot be decoded: "), closing(plan_of(broken, workers)) as batches:
        next(batches)
    missing = Samples((tmp_path / "no.png",), np.zeros(4, np.int64), (("a",),) * 4, (Part("no", 4),))
    with pytest.raises(UserError, match=r"no.png does not exist."), closing(plan_of(missing, workers)) as batches:
        next(batches)


def plan_of(samples: Samples, workers: int) -> Generator[Loaded, None, None]:
    return load(planned(samples, Order(samples.parts, 2, seed=1), TRANSFORMS[:1]), workers)


def test_pictures_in_memory_are_decoded_as_files(samples: Samples) -> None:
    data = samples.pictures[5].read_bytes()
    np.testing.assert_array_equal(np.asarray(open_encoded(Encoded("x", data))), np.asarray(open_rgb(samples.pictures[5])))
    with pytest.raises(UserError, match=r"x is not a picture in a format that Pillow decodes by itself."):
        open_encoded(Encoded("x", b"no picture"))
    with pytest.raises(UserError, match=r"x cannot be decoded: "):
        open_encoded(Encoded("x", data[:300]))


def test_questions_bring_their_answers(samples: Samples) -> None:
    answers = tuple(((f"answer {n}", 0.7), ("other", 0.3)) for n in range(4))
    asked = Samples(samples.pictures, np.arange(4), tuple((f"question {n}",) for n in range(4)), (Part("q", 4),), answers)
    batch = next(load(planned(asked, Order(asked.parts, 4, seed=1), TRANSFORMS[:1])))
    assert batch.answers is not None
    assert [each[0][0].replace("answer", "question") for each in batch.answers] == list(batch.texts)
    assert next(load(planned(samples, order(samples), TRANSFORMS))).answers is None


def test_transforms_belong_to_parts(samples: Samples) -> None:
    with pytest.raises(Misuse, match="There are 1 transforms for 2 sources; expected one each"):
        next(planned(samples, order(samples), TRANSFORMS[:1]))


def test_captions_are_cut_to_the_longest() -> None:
    tokenizer = CaptionTokenizer.load(Path(__file__).parent.parent / "demo" / "tokenizer")
    ids, mask = tokenised(["a red circle!", "Red"], tokenizer, 30, 12)
    whole, whole_mask = tokenizer.encode(["a red circle", "red"], 12)
    length = whole_mask.sum(1).max()
    assert ids.shape == mask.shape == (2, length)
    assert length < 12
    np.testing.assert_array_equal(ids, whole[:, :length])
    np.testing.assert_array_equal(mask, whole_mask[:, :length])
    np.testing.assert_array_equal(tokenised(["a red circle"], tokenizer, 1, 12)[0], tokenizer.encode(["a"], 3)[0])

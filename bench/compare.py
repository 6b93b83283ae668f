"""Our graphs and Hugging Face transformers on the same work, the same weights, the same threads, taking turns.

Three works: pictures embedded, captions embedded, captions scored against one picture. Before a ratio is worth
anything the results have to agree, so they are compared first. C captions, L tokens, T image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from bench.captions import Captions
from bench.measure import Timing, Work, interleave
from models.config import CLIP
from models.errors import Misuse, UserError
from runtime.batches import slices
from runtime.embed import embed_captions
from runtime.graphs import Graphs
from runtime.rerank import score_picture
from runtime.session import Session, open_session

if TYPE_CHECKING:
    from bench.rival import Rival

# The works, and the graphs that each takes; the features of the picture of `pairs` come from its encoder.
NEEDED = {
    "pictures": ("image",),
    "captions": ("text_embed",),
    "pairs": ("image", "image_kv", "itm_cached", "itm"),
}
# Largest difference of an embedding or a logit, over the largest value (at least 1). Float rounding gave at most 2e-6 on
# models of test, demo and full size; other weights give 0.1 and more, one tensor that is a twentieth off 5e-4 and more.
AGREEMENT = 1e-4
WARMUP = 1  # rounds, after the run whose results are compared


@dataclass(frozen=True)
class Setting:
    """What to compare, and how."""

    works: Sequence[str]  # of NEEDED
    batchsize: int  # pictures, and captions to embed, at a time
    itm_batchsize: int  # captions of one picture at a time
    rounds: int
    threads: int


@dataclass(frozen=True)
class Way:
    """One way to do a work."""

    name: str
    items: int
    run: Callable[[], np.ndarray]


Difference = Callable[[str, Way, np.ndarray], float]  # of a way's result from ours, or an error


@dataclass(frozen=True)
class Measured:
    """One work, done in several ways; ours is the first, transformers' the last."""

    work: str
    items: dict[str, int]  # by way
    timings: dict[str, Timing]  # by way
    differences: dict[str, float] = field(default_factory=dict)  # largest absolute difference from ours, by way

    def rate(self, way: str) -> float:
        """Items per second, in the median round."""
        return self.items[way] / self.timings[way].median

    def ratio(self, way: str) -> float:
        """How many times the rate of `way` ours is."""
        return self.rate(self.ours) / self.rate(way)

    def ratios(self, way: str) -> tuple[float, float]:
        """The lowest and the highest of the rounds."""
        scale = self.items[self.ours] / self.items[way]
        found = [scale * b / a for a, b in zip(self.timings[self.ours].seconds, self.timings[way].seconds, strict=True)]
        return min(found), max(found)

    @property
    def ours(self) -> str:
        """The way of the graphs, which the others are compared with."""
        return next(iter(self.items))

    def record(self) -> dict[str, Any]:
        """As a record keeps it."""
        ways = [
            {
                "way": way,
                "items": self.items[way],
                "median_s": round(timing.median, 6),
                "per_s": round(self.rate(way), 4),
                "seconds": [round(s, 6) for s in timing.seconds],
                **({} if way == self.ours else self._against(way)),
            }
            for way, timing in self.timings.items()
        ]
        return {"work": self.work, "ways": ways}

    def _against(self, way: str) -> dict[str, Any]:
        return {
            "ours_is_times": round(self.ratio(way), 3),
            "lowest_and_highest_round": [round(r, 3) for r in self.ratios(way)],
            "max_abs_difference": self.differences[way],
        }


def chosen_works(works: str | None, there: Iterable[str] = NEEDED) -> list[str]:
    """The works that --works lists, with commas between, of those that are `there`; all without it. Raises Misuse for another
    name."""
    known = list(there)
    if works is None:
        return known
    names = works.split(",")
    if unknown := [name for name in names if name not in known]:
        raise Misuse(f"There is no work {unknown[0]!r} to compare; there are {', '.join(known)}.")
    return [work for work in known if work in names]


def load_rival(graphs: Graphs, checkpoint: Path, vit_checkpoint: Path | None, threads: int) -> Rival:
    """transformers' model. Raises UserError when transformers is missing, or the checkpoint is not of these graphs' size,
    Misuse when transformers has no such model."""
    if graphs.config.vision.kind == CLIP:
        raise Misuse("transformers has no BLIP-2 with CLIP's image encoder; leave out --compare transformers.")
    with transformers_wanted():
        from bench.rival import Rival
    return Rival(graphs.config, checkpoint, vit_checkpoint, threads)


@contextmanager
def transformers_wanted() -> Iterator[None]:
    """For imports of what a comparison needs: turn its absence into a sentence."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"--compare transformers needs {error.name}, which is not installed here: pip install 'torch' 'transformers>=5.23'."
        ) from error


def compare(graphs: Graphs, rival: Rival, captions: Captions, setting: Setting) -> list[Measured]:
    """The works of `setting`, each with a progress bar. Raises UserError when a graph is missing, or when the results do
    not agree. The graphs of a work are loaded for it and released after it: those of an image encoder take gigabytes."""
    graphs.first_of(tuple(dict.fromkeys(name for work in setting.works for name in NEEDED[work])))
    ways = {
        "pictures": lambda: picture_ways(graphs, rival, setting),
        "captions": lambda: caption_ways(graphs, rival, captions, setting),
        "pairs": lambda: pair_ways(graphs, rival, captions, setting),
    }
    return [take_turns(work, ways[work](), setting.rounds, difference) for work in setting.works]


def picture_ways(graphs: Graphs, rival: Rival, setting: Setting) -> list[Way]:
    """image_embed (B, E), or (B, Q, E) of BLIP-2, of one batch of pictures."""
    image = _opened(graphs, "image", setting)
    images = _random_pictures(graphs, image.batch or setting.batchsize)
    return [
        Way("image graph", len(images), lambda: image.run(input_image=images)["image_embed"]),
        Way(f"transformers: {rival.theirs.image_parts}", len(images), lambda: rival.image_embed(images)),
    ]


def caption_ways(graphs: Graphs, rival: Rival, captions: Captions, setting: Setting) -> list[Way]:
    """text_embed (C, E): ours in batches of like length, as runtime/embed.py; theirs padded, as the original."""
    session, (count, width) = _opened(graphs, "text_embed", setting), captions.ids.shape
    size = session.batch or setting.batchsize
    return [
        Way("text_embed graph, like lengths together", count, lambda: embed_captions(session, captions.ids, captions.mask, size)),
        Way(
            f"transformers: {rival.theirs.text_parts}, padded to {width}",
            count,
            lambda: rival.text_embed(captions.ids, captions.mask, size),
        ),
    ]


def pair_ways(graphs: Graphs, rival: Rival, captions: Captions, setting: Setting) -> list[Way]:
    """itm_logits (C, 2) of one picture: ours as runtime/rerank.py, keys and values included; pair by pair in the same
    engine; pair by pair in transformers. The latter two take many times longer, so they score one batch of the captions:
    padded, every pair takes the same time."""
    picture = _random_pictures(graphs, 1)
    feat = _opened(graphs, "image", setting).run(input_image=picture)["image_feat"]  # (1, T, D)
    cached = [_opened(graphs, name, setting) for name in ("image_kv", "itm_cached")]
    itm = _opened(graphs, "itm", setting)
    few = captions.first(setting.itm_batchsize)
    ids, mask, few_ids, few_mask = captions.itm_ids, captions.mask, few.itm_ids, few.mask
    count, width = few_ids.shape
    size = itm.batch or setting.itm_batchsize

    def per_pair() -> np.ndarray:
        rows = []
        for part in slices(0, count, size):
            repeated = np.repeat(feat, len(few_ids[part]), axis=0)  # (B, T, D)
            found = itm.run(text_ids=few_ids[part], text_atten_mask=few_mask[part], image_feat=repeated)
            rows.append(found["itm_logits"])
        return np.concatenate(rows)

    return [
        Way(
            "image_kv + itm_cached graphs, like lengths together",
            len(ids),
            lambda: score_picture(cached, feat, ids, mask, setting.itm_batchsize),
        ),
        Way(f"itm graph, per pair, padded to {width}", count, per_pair),
        Way(
            f"transformers: {rival.theirs.pair_parts}, per pair, padded to {width}",
            count,
            lambda: rival.itm_logits(feat, few_ids, few_mask, size),
        ),
    ]


def _opened(graphs: Graphs, name: str, setting: Setting) -> Session:
    return open_session(graphs, name, threads=setting.threads)


def take_turns(work: str, ways: list[Way], rounds: int, difference: Difference) -> Measured:
    """Time the ways by turns, with a progress bar, once `difference` has found each way's result to be that of the first."""
    ours, *others = ways
    result = ours.run()
    differences = {way.name: difference(work, way, result) for way in others}
    runs: dict[str, Work] = {way.name: way.run for way in ways}
    with tqdm(total=len(ways) * (rounds + WARMUP), desc=work, disable=None, leave=False) as bar:
        timings = interleave(runs, rounds, WARMUP, bar.update)
    return Measured(work, {way.name: way.items for way in ways}, timings, differences)


def difference(work: str, way: Way, ours: np.ndarray) -> float:
    """The largest absolute difference. Raises UserError when it is more than rounding."""
    theirs = way.run()
    found = float(np.abs(ours[: len(theirs)] - theirs).max())
    if not found <= AGREEMENT * max(1.0, float(np.abs(theirs).max())):
        raise UserError(
            f"The {work} come out differently: {way.name} differs from our graphs by {found:.1e}, so the speeds are not of equal "
            "work. Give --checkpoint the file that the graphs were exported from."
        )
    return found


def _random_pictures(graphs: Graphs, count: int) -> np.ndarray:
    size = graphs.config.vision.image_size
    return np.random.default_rng(0).standard_normal((count, 3, size, size), np.float32)

"""The batches of pairs that itm_cached takes from files: which pairs are in each, how many there are, what the files are called.

Their names begin with a tag of the pairs, which ais_bench's summary repeats: so it is known of which pairs the scores are. N
pictures, P pairs, R captions in a batch.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from preprocess.tensors import stems
from runtime.ais_bench_run import ITM, MOST_FILES
from runtime.batches import slices
from runtime.plan import Plan


def chunks(image: np.ndarray, rows: int) -> list[slice]:
    """Which pairs are in each batch: at most `rows`, all of one picture. `image` (P,) ascends."""
    edges = [0, *(np.flatnonzero(np.diff(image)) + 1).tolist(), len(image)]
    return [part for first, last in itertools.pairwise(edges) for part in slices(first, last, rows)]


def tag_of(plan: Plan, rows: int) -> str:
    """What tells batches of these pairs from those of others: 12 hexadecimal digits."""
    digest = hashlib.sha256(f"{rows} {len(plan.image)} ".encode())
    for pairs in (plan.image, plan.text):
        digest.update(np.ascontiguousarray(pairs, np.int64).tobytes())
    return digest.hexdigest()[:12]


def named(tag: str, batches: int) -> list[str]:
    """The stems of the files of so many batches of the pairs `tag`, in their order."""
    return [f"{tag}_{stem}" for stem in stems(batches)]


def fewest(pictures: int, captions: int, k: int, rows: int) -> int:
    """Batches of `rows` captions of one picture that re-ranking at `k` takes at least, whatever the candidates are: every picture
    has k captions, and every caption k pictures."""
    each = min(k, captions)
    pairs = max(pictures * each, captions * min(k, pictures))
    return max(pictures * -(-each // rows), -(-pairs // rows))


def enough(pictures: int, captions: int, k: int) -> int | None:
    """A batch with which ais_bench takes the files, whatever the candidates are; None when none will do.

    There are at most (P + N (R - 1)) / R, since a picture leaves at most one batch that is not full.
    """
    if pictures >= MOST_FILES:
        return None
    pairs = min(pictures * captions, (pictures + captions) * k)
    return max(1, -(-(pairs - pictures) // (MOST_FILES - pictures)))


def too_many(batches: str, rows: int, pictures: int, captions: int, k: int) -> str:
    """The sentence for more files than ais_bench takes."""
    sufficient = enough(pictures, captions, k)
    return (
        f"k_test {k} of {pictures:,} pictures and {captions:,} captions makes {batches} batches of {rows} pairs, each a file; "
        f"ais_bench takes {MOST_FILES:,} in a folder. Choose a smaller --k-test"
        + (f", or compile {ITM} for a larger batch: {sufficient} is enough (--itm-batchsize)." if sufficient else ".")
    )

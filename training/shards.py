"""Captioned pictures from tar shards, for sets beyond one disk's files: WebDataset's form, read by its library.

A shard is a tar whose files come in samples: files with the same name up to its first dot follow one another. Each sample has a
picture (PICTURES) and its caption, NAME.txt with one, or NAME.json with {"caption": a text or a list to draw one from}.

What is promised: the batches of a process depend on the shards, the seed and the number of processes alone, not on the number of
workers. A training that goes on from a position gets bit-equal batches; for that the shards of the epoch are read from their
start, and what came before is passed over without being decoded. Not promised, unlike for samples in files: that an epoch has
each sample once (a process with few samples begins its shards again, one with many leaves the rest), or that N processes see
together the batches of one.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from models.errors import Misuse, UserError, extra
from preprocess.annotations import in_words
from preprocess.checked import checked_list, checked_text
from training.loader import Draw, Encoded, Planned
from training.order import CAPTION, ORDER, START, Position, randomness
from training.transforms import Transform

PICTURES = ("jpg", "jpeg", "png", "webp")  # suffixes, also in capital letters
BUFFER = 1000  # samples among which the next one is drawn
BROKEN = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error)  # what reading a tar raises
BLOCK = 512  # bytes of the head that each file has in a tar; at the end of the tar they are 0
MAGIC = slice(257, 262)  # where a head says "ustar"


@dataclass(frozen=True)
class Shards:
    """Tar files, and what an epoch of them is."""

    files: tuple[Path, ...]
    samples: int  # in an epoch, of all processes together
    buffer: int = BUFFER

    def batches_per_epoch(self, batchsize: int, ranks: int = 1) -> int:
        """Of `batchsize` samples in each of `ranks` processes. Raises Misuse when there is none."""
        if (found := self.samples // (batchsize * ranks)) < 1:
            raise Misuse(
                f"A batch has {batchsize * ranks:,} samples over all processes, but an epoch of the shards has only "
                f"{self.samples:,}. Choose a smaller batchsize."
            )
        return found


def open_shards(pattern: str, samples: int | None = None, buffer: int = BUFFER) -> Shards:
    """The shards of a pattern such as "cc3m-{0000..0331}.tar", which are files on this machine.

    Args:
        samples: that an epoch has; None counts those of the shards, by reading the heads of all their files.

    Raises UserError when the library is not installed, when a shard is missing, or, where they are counted, no whole tar; Misuse
    when the pattern names something else than files.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise Misuse(f"The shards {pattern} are not on this machine; expected the names of files. Copy them here first.")
    with extra("shards"):
        from braceexpand import braceexpand
    try:
        files = tuple(Path(name) for name in braceexpand(pattern))
    except ValueError as error:
        raise Misuse(f"The braces in {pattern} have no meaning: {error}. Write them as in cc3m-{{0000..0331}}.tar.") from error
    if missing := [file for file in files if not file.is_file()]:
        more = f", nor are {len(missing) - 1:,} others of the {len(files):,}" if len(missing) > 1 else ""
        raise UserError(f"There is no shard {missing[0]}{more}. Give the names of tar files, such as cc3m-{{0000..0331}}.tar.")
    return Shards(files, sum(map(count_samples, files)) if samples is None else samples, buffer)


def count_samples(file: Path) -> int:
    """How many samples a shard holds. Raises UserError, naming it, when it is no whole tar, or holds none."""
    try:
        with tarfile.open(file) as tar:
            members = [{"fname": m.name, "data": b"", "__url__": str(file)} for m in tar if m.isreg() and not _meta(m.name)]
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(BLOCK)
        if rest != bytes(BLOCK):  # tarfile takes a damaged head, or no more bytes, for the end
            raise tarfile.ReadError(f"it neither ends nor goes on at byte {tar.offset:,}")
        count = sum(1 for _ in _grouped(members))
    except BROKEN as error:
        raise _broken(file, error) from error
    if not count:
        raise UserError(f"{file} holds no sample; expected pictures with their captions, such as 0001.jpg and 0001.txt.")
    return count


def read_shard(file: Path) -> Iterator[dict[str, Any]]:
    """The samples of a shard in order: bytes by suffix, and the name under "__key__".

    Raises UserError, naming the shard, when it is no whole tar. (A damaged head in its last 10,240 bytes, which the library reads
    at once and takes for the end, is seen by `count_samples` alone.)
    """
    with extra("shards"):
        from webdataset.tariterators import tar_file_expander
    try:
        with file.open("rb") as stream:
            plain = stream.read(BLOCK)[MAGIC] == b"ustar"  # not compressed
            stream.seek(0)
            yield from _grouped(tar_file_expander([{"url": str(file), "stream": stream}]))
            if plain:
                _check_end(stream)
    except BROKEN as error:
        raise _broken(file, error) from error


def planned_shards(
    shards: Shards,
    transform: Transform,
    seed: int,
    batchsize: int,
    start: Position = START,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Planned]:
    """Endless batches of `batchsize` samples from `start` on, for process `rank` of `ranks`: it reads every ranks-th shard, which
    are others in each epoch.

    Raises UserError, naming the shard, when one is broken or a sample lacks its picture or caption; Misuse when there are fewer
    shards than processes.
    """
    if len(shards.files) < ranks:
        raise Misuse(f"There are {len(shards.files)} shards for {ranks} processes; expected one each at least. Split them.")
    batches = shards.batches_per_epoch(batchsize, ranks)
    epochs, first = divmod(start.batch, batches)
    epoch = start.epoch + epochs
    while True:
        samples = islice(enumerate(_shuffled(shards, seed, epoch, rank, ranks)), first * batchsize, batches * batchsize)
        for batch in range(first, batches):
            draws = tuple(
                _draw(file, sample, transform, (seed, epoch, place * ranks + rank))
                for place, (file, sample) in islice(samples, batchsize)
            )
            yield Planned(Position(epoch, batch), draws)
        epoch, first = epoch + 1, 0


def _shuffled(shards: Shards, seed: int, epoch: int, rank: int, ranks: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Endless samples of one process: its shards again and again, each time through the buffer."""
    with extra("shards"):
        from webdataset.filters import shuffle
    order = randomness(ORDER, seed, epoch).permutation(len(shards.files))[rank::ranks]
    rng = random.Random(f"{seed} {epoch} {rank} {ranks}")
    mixed = shuffle(shards.buffer, initial=shards.buffer, rng=rng)
    while True:
        count = 0
        for found in mixed((file, sample) for file in (shards.files[n] for n in order) for sample in read_shard(file)):
            count += 1
            yield found
        if not count:
            raise UserError(f"{shards.files[order[0]]} and the others hold no sample; there is nothing to train on.")


def _draw(file: Path, sample: dict[str, Any], transform: Transform, key: tuple[int, int, int]) -> Draw:
    where = f"{file}, sample {sample['__key__']}"
    suffix = next((suffix for suffix in PICTURES if suffix in sample), None)
    if suffix is None:
        raise UserError(f"{where} has no picture; expected a file that ends in {', '.join(PICTURES)}.")
    captions = _captions(sample, where)
    text = captions[0] if len(captions) == 1 else captions[int(randomness(CAPTION, *key).integers(len(captions)))]
    number = (
        int.from_bytes(blake2b(where.encode(errors="surrogateescape"), digest_size=8).digest()) >> 1
    )  # 63 bits, the same each time
    return Draw(Encoded(where, sample[suffix]), transform, key, number, text)


def _captions(sample: dict[str, Any], where: str) -> list[str]:
    try:
        if "txt" in sample:
            return [checked_text(sample["txt"].decode("utf-8-sig").strip(), where, "its caption")]
        if "json" not in sample:
            raise UserError(f"{where} has no caption; expected a file that ends in txt or json.")
        values = json.loads(sample["json"])
    except ValueError as error:
        raise UserError(f"{where}: its caption is no UTF-8 text or JSON ({error}).") from error
    captions = values.get("caption") if isinstance(values, dict) else None
    if isinstance(captions, list):
        return [checked_text(text, where, "a caption") for text in checked_list(captions, f"{where}: its caption is", "texts")]
    if not isinstance(captions, str):
        raise UserError(f"{where}: its JSON has {in_words(captions)} for a caption; expected a text or a list of texts.")
    return [checked_text(captions, where, "its caption")]


def _grouped(files: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    with extra("shards"):
        from webdataset.tariterators import group_by_keys
    samples: Iterator[dict[str, Any]] = group_by_keys(files)
    return samples


def _check_end(stream: BinaryIO) -> None:
    """Raise ReadError when a tar that was read to its end, as it seemed, goes on there, or was cut off."""
    rest = stream.read(BLOCK)
    stream.seek(-BLOCK, io.SEEK_END)
    if rest.strip(b"\0") or stream.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError("its last files are damaged or missing")


def _meta(name: str) -> bool:
    """Whether WebDataset keeps its own notes there."""
    return "/" not in name and name.startswith("__") and name.endswith("__")


def _broken(file: Path, error: BaseException) -> UserError:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error.args[0] if error.args else "")
    why = said.split(" @ ")[0].split("\n")[0].strip(" .:") or type(error).__name__  # the library adds the file after the @
    return UserError(f"{file} is no whole tar of samples: {why[:200]}. Copy or make it again.")

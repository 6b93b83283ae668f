"""CIFAR-100 and CIFAR-10 in the Python version that their authors publish: pickles, read so that nothing in them runs.

A pickle is a program for a machine that can call any function of Python. Here the machine knows the few names that arrays
and bytes are written with (KNOWN), and all stand for classes of ours: the array is made from what they recorded, after its
type, shape and size were checked.

Forms: https://www.cs.toronto.edu/~kriz/cifar.html. Written by Python 2, so the keys may be bytes; written again by Python 3,
any of the protocols 0 to 5. N pictures, C classes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import Misuse, UserError
from preprocess.annotations import in_words, is_text, part
from preprocess.images import obstacle

SPLITS = ("test", "train")
LABELS = ("fine", "coarse")  # 100 classes or 20 groups of them
SIDE = 32  # pixels
ROW = 3 * SIDE * SIDE  # bytes: the red plane, the green one, the blue one
LARGEST = 1 << 28  # bytes; the largest official file, the train part of CIFAR-100, has 155 MB
MOST_STEPS = 1_000_000  # of one pickle; that file takes some 200,000, or 700,000 where bytes are written as calls
MOST_TUPLES = 100  # beside arguments; an array takes 6. Hashing tuples within tuples without end would overflow the stack


@dataclass(frozen=True)
class Cifar:
    """One part of a data set."""

    pixels: np.ndarray  # (N, 32, 32, 3) uint8
    labels: list[int]  # N, each below C
    classes: list[str]  # C, as the file spells them
    names: list[str]  # N: the file names of the pictures, or their numbers when not all are kept


@dataclass(frozen=True)
class Form:
    """Where a data set keeps what."""

    name: str
    folder: str  # in its archive
    meta: str  # the file with the names of the classes
    batches: dict[str, tuple[str, ...]]  # the files of each split
    keys: dict[str, tuple[str, str]]  # for each kind of labels: of the names in `meta`, of the labels in a batch


FORMS = (
    Form(
        "CIFAR-100",
        "cifar-100-python",
        "meta",
        {"test": ("test",), "train": ("train",)},
        {"fine": ("fine_label_names", "fine_labels"), "coarse": ("coarse_label_names", "coarse_labels")},
    ),
    Form(
        "CIFAR-10",
        "cifar-10-batches-py",
        "batches.meta",
        {"test": ("test_batch",), "train": tuple(f"data_batch_{n}" for n in range(1, 6))},
        {"fine": ("label_names", "labels")},
    ),
)


def read_cifar(folder: Path, split: str = "test", labels: str = "fine") -> Cifar:
    """Read one of SPLITS, with one of LABELS, from the unpacked archive or from the folder that holds it.

    Raises UserError that names the file and what was found there: no such file, no pickle, one that would run code or asks
    for more memory than pictures and labels take, arrays of another type or shape, labels that name no class. Raises Misuse
    when the data set has no such labels.
    """
    place, form = _find(folder)
    if labels not in form.keys:
        raise Misuse(f"{form.name} has no {labels} labels; leave --labels out.")
    in_meta, in_batch = form.keys[labels]
    meta = load_pickle(place / form.meta)
    classes = _texts(part(meta, in_meta, str(place / form.meta)), f"{place / form.meta}: its {in_meta!r}")
    batches = [_read_batch(place / file, in_batch, len(classes)) for file in form.batches[split]]
    pixels = np.concatenate([pixels for pixels, _, _ in batches])  # (N, 32, 32, 3)
    names = [name for _, _, names in batches for name in names]
    if len(names) < len(pixels):
        names = [str(number) for number in range(len(pixels))]
    return Cifar(pixels, [label for _, labels, _ in batches for label in labels], classes, names)


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle, its keys as texts, its arrays as `Array`. Raises UserError, see read_cifar."""
    if reason := obstacle(path):
        raise UserError(f"{path} {reason}; expected a file of CIFAR's Python version. Unpack its archive again.")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path} has {size:,} bytes; CIFAR's own files have less than {LARGEST:,}.")
    data = path.read_bytes()
    try:
        _check_steps(data, path)
        # latin1: what Python 2 called a text may be bytes, and this keeps them.
        values = _Unpickler(path, io.BytesIO(data), encoding="latin1").load()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a damaged program runs into is open: UnpicklingError, EOFError, KeyError, TypeError, ...
        raise UserError(
            f"{path} is no pickle, or was cut off ({type(error).__name__}). Unpack the archive of CIFAR again."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {_what(values)}; expected the dictionary of CIFAR's Python version.")
    return {_text(key): value for key, value in values.items() if isinstance(key, str | bytes)}


class Array:
    """Stands for a numpy array in a pickle, and for the function that makes one: it records what the array is made from."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Dtype(Array):
    """The same for the type of its elements; what it was called with names it."""

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which a byte has none of."""


class Encoded(Array):
    """Stands for the call that makes bytes of a text in protocols 0 to 2. It gives the text, which says the same as a string
    of Python 2 does: a copy for each of a million calls on one large text would take any memory."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if not isinstance(text, str) or encoding != "latin1":
            raise TypeError("bytes are written as the latin1 of a text")
        return text


class Empty(Array):
    """The same for no bytes, which have no arguments: those that bytes() takes could ask for any memory."""

    def __new__(cls) -> Any:
        return ""


KNOWN: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): Array,  # protocol 5
    ("numpy._core.numeric", "_frombuffer"): Array,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): Encoded,
    ("__builtin__", "bytes"): Empty,  # as Python 3 calls it for Python 2
    ("builtins", "bytes"): Empty,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.path = path

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in KNOWN:
            raise UserError(
                f"{self.path} is refused: reading it would run code ({f'{module}.{name}'[:60]!a}). "
                "CIFAR's own files ask for none; download them again from their authors."
            )
        return KNOWN[module, name]


def _check_steps(data: bytes, path: Path) -> None:
    """Raise UserError when the program would take more memory than its size allows, ValueError when it is cut off.

    Python's unpickler sets memory aside for the sizes that a pickle declares before it looks whether they are there; this
    walk over its steps does not.
    """
    tuples, fresh, kept = 0, False, set()
    for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        put = opcode.name.endswith("PUT")
        if opcode.name.startswith("TUPLE"):
            tuples, fresh = tuples + 1, True
        elif fresh and put:
            kept.add(argument)
        else:  # A tuple that a call takes at once is in no other, unless it is fetched from the memo again.
            tuples += (opcode.name.endswith("GET") and argument in kept) - (fresh and opcode.name == "REDUCE")
            fresh = False
        # PUT, BINPUT, LONG_BINPUT: the memo is a list as long as the largest number. Picklers count from 0 or 1.
        numbered = put and isinstance(argument, int) and argument > step
        if numbered or step > MOST_STEPS or tuples > MOST_TUPLES:
            raise UserError(f"{path} is refused: it asks for more memory than the pictures and labels of CIFAR take.")


def _find(folder: Path) -> tuple[Path, Form]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; --cifar takes the unpacked cifar-100-python.")
    found = [(place, form) for form in FORMS for place in (folder, folder / form.folder) if (place / form.meta).exists()]
    if not found:
        raise UserError(
            f"{folder} holds neither {' nor '.join(f'the {form.meta} of {form.name}' for form in FORMS)}; "
            "--cifar takes the unpacked cifar-100-python, of the Python version."
        )
    if len(found) > 1:
        raise UserError(f"{folder} holds more than one data set; choose: --cifar {' or '.join(str(p) for p, _ in found)}.")
    return found[0]


def _read_batch(path: Path, key: str, classes: int) -> tuple[np.ndarray, list[int], list[str]]:
    """Pixels (N, 32, 32, 3), N labels, and N file names or none."""
    batch = load_pickle(path)
    pixels = _pixels(part(batch, "data", str(path)), path)
    labels = part(batch, key, str(path))
    if not isinstance(labels, list):
        raise UserError(f"{path}: its {key!r} is {_what(labels)}; expected a list of whole numbers.")
    for number, label in enumerate(labels):
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
            raise UserError(f"{path}: entry {number} of its {key!r} is no whole number from 0 to {classes - 1}.")
    names = _texts(batch["filenames"], f"{path}: its 'filenames'") if "filenames" in batch else []
    for what, count in ((key, len(labels)), ("filenames", len(names) or len(pixels))):
        if count != len(pixels):
            raise UserError(f"{path} has {len(pixels):,} pictures, but {count:,} entries in {what!r}. Unpack the archive again.")
    return pixels, labels, names


def _pixels(value: Any, path: Path) -> np.ndarray:
    """(N, 32, 32, 3) uint8, from what an array was to be made of."""
    expected = f"expected uint8 (N, {ROW:,})"
    made = value.state if isinstance(value, Array) else None
    match made:
        case (_, shape, kind, bool(by_columns), raw):  # by _reconstruct; now as _frombuffer has it
            made = (raw, kind, shape, "F" if by_columns else "C")
    match made:
        case (
            (str() | bytes() | bytearray()) as raw,
            Dtype(state=(str(dtype), *_)),
            (int(rows), int(columns)),
            ("C" | "F") as order,
        ) if max(rows, columns) < LARGEST:
            if (dtype, columns) != ("u1", ROW) or rows < 1:
                raise UserError(f"{path}: its data is {dtype[:20]!a} ({rows:,}, {columns:,}); {expected}.")
        case _:
            raise UserError(f"{path}: its data is {_what(value)}; {expected}.")
    # A character that is no byte becomes several, and the size tells.
    data = raw.encode("latin1", "backslashreplace") if isinstance(raw, str) else raw
    if len(data) != rows * columns:
        raise UserError(f"{path}: its data has {len(data):,} bytes for {rows:,} pictures of {ROW:,}. Unpack the archive again.")
    table = np.frombuffer(data, np.uint8).reshape((rows, columns), order=order)  # (N, 3072)
    return table.reshape(rows, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)


def _texts(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where} is {'an empty list' if values == [] else _what(values)}; expected a list of texts.")
    for number, value in enumerate(values):
        if not isinstance(value, str | bytes) or not value:
            raise UserError(f"{where} holds {_what(value)} in entry {number}; expected texts alone.")
        if not is_text(_text(value)):
            raise UserError(f"{where} holds half a character in entry {number}. Unpack the archive again.")
    return [_text(value) for value in values]


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _what(value: Any) -> str:
    return "an array" if isinstance(value, Array) else in_words(value)

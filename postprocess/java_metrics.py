"""METEOR and SPICE, by pycocoevalcap and Java where both are installed: no figure, and why, where they are not.

Nothing is downloaded. SPICE needs Stanford CoreNLP 3.6.0 beside pycocoevalcap, which that package fetches by itself when its
scorer is made; so its COCOEvalCap, which makes SPICE's first, is not used.
"""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postprocess.scored import Absent, Scored

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
FETCH = "python -m pycocoevalcap.spice.get_stanford_models"
# What a Java that dies looks like from here: a broken pipe, no number where one was expected, a code, a file that is not there.
DIED = (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError)


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scored | Absent:
    """METEOR of N tokenised captions, each against one or more tokenised references."""
    return _found("METEOR", lambda: _meteor(candidates, references), len(candidates))


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scored | Absent:
    """SPICE of N tokenised captions, each against one or more tokenised references. It takes minutes for thousands."""
    return _found("SPICE", lambda: _spice(candidates, references), len(candidates))


def _found(name: str, compute: Callable[[], tuple[float, list[float]] | Absent], captions: int) -> Scored | Absent:
    if shutil.which("java") is None:
        return Absent(f"{name} needs Java, and there is no java on the PATH.")
    try:
        found = compute()
    except ImportError as error:
        missing = (error.name or "pycocoevalcap").partition(".")[0]
        return Absent(f"{name} needs {missing}, which is not installed. Install it with: pip install {missing}")
    except DIED as error:
        return Absent(f"{name} was not computed: {_first_line(str(error)) or type(error).__name__}.")
    if isinstance(found, Absent):
        return found
    corpus, each = found
    if len(each) != captions or not all(math.isfinite(value) for value in (corpus, *each)):
        return Absent(f"{name} was not computed: Java did not give a number for each of {captions:,} captions.")
    return Scored(float(corpus), np.array(each, np.float64))


def _meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    scorer = importlib.import_module("pycocoevalcap.meteor.meteor").Meteor()
    bars = "|||"  # separates texts on their way to Java; the package takes it out of captions, but not out of references
    asked = {number: [text.replace(bars, "") for text in texts] for number, texts in enumerate(references)}
    try:
        found: tuple[float, list[float]] = scorer.compute_score(asked, _by_number(candidates))
    except DIED as error:
        said = _last_words(scorer)
        raise OSError(f"Java stopped, {f'saying: {said}' if said else 'saying nothing'}") from error
    finally:
        _end(scorer)
    return found


def _spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]] | Absent:
    module = importlib.import_module("pycocoevalcap.spice.spice")
    library = Path(str(module.__file__)).parent / "lib"
    if missing := [name for name in CORENLP if not (library / name).is_file()]:
        return Absent(f"SPICE needs {' and '.join(missing)} in {library}. With a network, this fetches them: {FETCH}")
    asked = {number: list(texts) for number, texts in enumerate(references)}
    corpus, each = module.Spice().compute_score(asked, _by_number(candidates))
    return corpus, [scores["All"]["f"] for scores in each]


def _by_number(candidates: Sequence[str]) -> dict[int, list[str]]:
    return {number: [text] for number, text in enumerate(candidates)}


def _last_words(scorer: Any) -> str:
    """What the scorer's Java wrote on its way out."""
    process = getattr(scorer, "meteor_p", None)
    if process is None:
        return ""
    process.kill()
    return _first_line(process.stderr.read().decode("utf-8", "replace"))


def _end(scorer: Any) -> None:
    """End the scorer's Java. Its own end waits for ever for a lock that a failed computation holds, so that is let go."""
    lock, process = getattr(scorer, "lock", None), getattr(scorer, "meteor_p", None)
    if lock is not None and lock.locked():
        lock.release()
    if process is None:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        try:
            pipe.close()
        except OSError:  # what was not yet written has no reader
            continue
    process.wait()


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "")[:200]

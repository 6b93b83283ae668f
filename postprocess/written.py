"""What the texts of a report were made of: a run over a data/ folder, a run over pictures that its command line named, or a
file of results of which nothing is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from models import manifest
from models.errors import Misuse, UserError
from models.manifest import Manifest
from postprocess import facts
from postprocess.gallery import Pictured, Pictures
from postprocess.made_from import open_data
from postprocess.picture_files import PictureFiles, as_named


class PicturedSet(Pictured, Protocol):
    """A data/ folder of pictures about which something was written."""

    @property
    def broken(self) -> list[dict[str, Any]]: ...


Data = TypeVar("Data", bound=PicturedSet)


@dataclass(frozen=True)
class Origin(Generic[Data]):
    """Of a run. N pictures."""

    data: Data | None  # None when the command line named the pictures
    images: list[dict[str, Any]]  # N of {"image": as named, "image_id", ...}
    picture: Pictures | PictureFiles
    facts: dict[str, Any]  # what the page says of every task, and the options that decided the texts


def of_run(run: Manifest, data: Path | None, read: Callable[[Path], Data]) -> Origin[Data]:
    """What the outputs `run` were made of; `read` opens the folder `data`, or the one that they name.

    Raises UserError when a manifest lacks something or the two do not belong together, Misuse when there is a folder and
    should be none.
    """
    named = run.content.get("data")
    if not isinstance(named, dict) or "images" not in named:
        found = open_data(run, data, read)
        return Origin(found, found.images, Pictures(found), _facts(run, found))
    if data:
        raise Misuse(f"{run.folder} is of pictures that were named on the command line, and not of a folder; leave --data out.")
    with facts.complete(run, None):
        images = [{**image, "image": str(image["image"]), "image_id": image["image_id"]} for image in named["images"]]
        return Origin(None, images, as_named(Path(named["folder"]), images), _facts(run, None))


def of_files(files: dict[str, Path]) -> dict[str, Any]:
    """What the page says of results that were not made here: which files they are. See `listed`."""
    empty: dict[str, Any] = {"protocol": {}, "options": {}, "backend": {}, "deviations": [], "parity": [], "timings": []}
    nothing: dict[str, Any] = {"graphs": None, "data": None, "outputs": None, "left_out": []}
    return {**empty, **nothing, "versions": manifest.versions(), "files": listed(files)}


def listed(files: dict[str, Path]) -> list[dict[str, str]]:
    """What was read beside folders: {"what", "file", "sha256"}. `files` are by what they are, the results first."""
    return [{"what": what, "file": str(path), "sha256": manifest.file_record(path)["sha256"]} for what, path in files.items()]


def refuse_others(run: Manifest, found: list[Any], wanted: list[Any], of: str) -> None:
    """Raise UserError unless the results are of the data, in their order."""
    if found != wanted:
        raise UserError(
            f"{run.folder} has {len(found):,} results, which are not of the {len(wanted):,} {of} of its data in their order. "
            f"Run {manifest.MADE_WITH['outputs']} {run.content['task']} again."
        )


def _facts(run: Manifest, data: Data | None) -> dict[str, Any]:
    with facts.complete(run, data.source if data else None):
        options = dict(run.content["options"])
        answers = options.pop("answers", None)  # to choose from
        own = run.content["graphs"]["config"]["protocol"]
        protocol = dict(data.protocol if data else own)
        ranked = {} if answers is None else {"k_test": int(options["k_test"])}
        shared = facts.shared(
            run, data.source if data else None, {**protocol, **ranked}, data.broken if data else [], len(answers or ())
        )
        shared["protocol"].pop("k_test", None)  # stands among the options where anything is ranked
        choice = {} if answers is None else {"answers": len(answers)}
        return {**shared, "options": {**options, **choice}, "files": []}

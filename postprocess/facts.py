"""What every report says beside its numbers, taken from the manifests: protocol, exactness, speed, where it all comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from models import manifest
from models.errors import UserError
from models.manifest import Manifest

# What the page's tables take from the manifests, and as what.
PARITY = {"graph": str, "output": str, "cases": str, "max_abs": float, "max_rel": float, "bound": float}
TIMING = {"stage": str, "items": int, "seconds": float, "resumed": int}
LEFT_OUT = {"image": str, "entry": int, "reason": str}
GRAPHS = ("digest", "folder", "model", "config", "opset", "target", "precision", "used")


def shared(
    run: Manifest, data: Manifest | None, protocol: Mapping[str, Any], broken: Sequence[Mapping[str, Any]], most_k: int
) -> dict[str, Any]:
    """Everything that does not depend on the task. `data` is None when the run had no data/ folder; `protocol` is the one that
    was used; a k_test beyond `most_k` has no effect. To be called under `complete`."""
    graphs = run.content["graphs"]
    files = [graphs["checkpoint"], *filter(None, [graphs["checkpoint"].get("vit")])]  # BLIP-2's image encoder may be a file apart
    checkpoint = [{part: str(file[part]) for part in ("file", "sha256")} for file in files]
    return {
        "protocol": dict(protocol),
        "deviations": _deviations(graphs["config"]["protocol"], protocol, most_k),
        "parity": _rows(graphs["parity"], PARITY),
        "timings": _rows(run.content["timings"], TIMING),
        "backend": dict(run.content["backend"]),
        "graphs": {part: graphs[part] for part in GRAPHS} | {"used": list(graphs["used"]), "checkpoint": checkpoint},
        "data": _origin(data) if data else None,
        "outputs": _origin(run),
        "left_out": _rows(broken, LEFT_OUT),
        "versions": manifest.versions(),
    }


@contextmanager
def complete(run: Manifest, data: Manifest | None) -> Iterator[None]:
    """While the two manifests, or the one, are read: what they lack becomes a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = [part for part in (run, data) if part]
        names = " or ".join(str(part.folder / manifest.NAME) for part in found)
        again = " and ".join(f"{manifest.MADE_WITH[part.kind]} {run.content['task']}" for part in reversed(found))
        raise UserError(f"{names} lacks or garbles {error}. Run {again} again.") from error


def _rows(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, type]) -> list[dict[str, Any]]:
    return [{name: kind(row[name]) for name, kind in columns.items()} for row in rows]


def _origin(source: Manifest) -> dict[str, Any]:
    """Which folder it was, what made it, and of which annotations or other source when it says so."""
    notes = []
    if annotations := source.content.get("annotations"):
        notes.append(f"annotations {annotations['file']} {annotations['sha256']}")
    if pictures := source.content.get("source"):
        notes.append("pictures from " + " ".join(map(str, pictures.values())))
    made_by = {part: source.made_by[part] for part in ("command", "python")} | {"versions": dict(source.made_by["versions"])}
    return {"digest": source.digest, "folder": str(source.folder), "made_by": made_by, "notes": notes}


def _deviations(published: Mapping[str, Any], used: Mapping[str, Any], most_k: int) -> list[dict[str, Any]]:
    """Where the data or the run departs from the protocol that belongs to the model: other settings, other numbers."""

    def plain(name: str, value: Any) -> Any:  # as JSON has it; of k_test what has an effect
        return min(value, most_k) if name == "k_test" else list(value) if isinstance(value, tuple) else value

    return [
        {"name": name, "model": value, "used": used[name]}
        for name, value in published.items()
        if plain(name, value) != plain(name, used[name])
    ]

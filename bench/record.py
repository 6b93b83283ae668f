"""One JSON file per run of the bench; its name says the conditions, its content everything that was measured."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.forms import Load
from models import manifest
from models.errors import Misuse

FORMAT = 1


def record_folder(folder: Path) -> Path:
    """Make the folder of records, before minutes are spent on what goes into it. Raises Misuse when it is a file."""
    if folder.exists() and not folder.is_dir():
        raise Misuse(f"{folder} is a file; --record takes a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def conditions(load: Load) -> str:
    """What a record's name says of them: bs8-t2-cpu."""
    return f"bs{load.batchsize}-t{load.threads}-{load.provider}"


def write_record(folder: Path, what: str, model: str, said: str, content: dict[str, Any]) -> Path:
    """Write `<what>-<model>-<said>-<UTC time>.json` into `folder`, by rename; returns its path."""
    now = datetime.now(timezone.utc)
    name = f"{what}-{_plain(model)}-{_plain(said)}-{now:%Y%m%d-%H%M%S}"
    head = {
        "format": FORMAT,
        "kind": "bench",
        "what": what,
        "date": now.isoformat(timespec="seconds"),
        "command": manifest.command(),
        "model": model,
    }
    path = folder / f"{name}.json"
    # Escaped to ASCII: a path in the command may hold bytes that UTF-8 cannot write.
    manifest.write_text(path, json.dumps(head | content, indent=1) + "\n")
    return path


def _plain(model: str) -> str:
    """A preset's name as it is; the file of a configuration without its folder, and safe in a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name.removesuffix(".json")) or "model"

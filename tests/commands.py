"""The console commands: the module that blip-NAME is in."""

from __future__ import annotations

COMMANDS = {
    "pre": "preprocess.__main__",
    "export": "export.__main__",
    "convert": "models.convert",
    "atc": "export.atc",
    "run": "runtime.__main__",
    "post": "postprocess.__main__",
    "bench": "bench.__main__",
    "train": "training.__main__",
}

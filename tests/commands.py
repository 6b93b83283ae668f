"""The console commands: blip-NAME is the folder of that step."""

from __future__ import annotations

COMMANDS = {
    "pre": "preprocess",
    "export": "export",
    "run": "runtime",
    "post": "postprocess",
    "bench": "bench",
    "train": "training",
}

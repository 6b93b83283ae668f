"""What a checkpoint can be converted to. Imports no torch, so that `--help` works anywhere."""

from __future__ import annotations

LAVIS, HF, OURS = "lavis", "hf", "ours"
TARGETS = (LAVIS, HF, OURS)

"""What a graph can be written for. Imports no torch, so that `blip-export --help` works anywhere."""

from __future__ import annotations

ORT, ATC = "ort", "atc"
TARGETS = (ORT, ATC)
# 13 is read by every CANN release from 5.0.4 on; 18 is what the dynamo exporter builds.
DEFAULT_OPSET = {ORT: 18, ATC: 13}
OPSETS = {ORT: range(18, 24), ATC: range(11, 19)}

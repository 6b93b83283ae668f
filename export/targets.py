"""What a graph can be written for. Imports no torch, so that `blip-export --help` works anywhere."""

from __future__ import annotations

ORT, ATC, ASCEND = "ort", "atc", "ascend"
TARGETS = (ORT, ATC, ASCEND)
# All axes fixed, in ASCEND but the batch, and with OPEN the text's too, which blip-atc fixes; buffers that the caller fills.
STATIC = (ATC, ASCEND)
OPEN = "open"  # in place of a text length
# 13 is read by every CANN release from 5.0.4 on, 17 from CANN 7 on; 18 is what the dynamo exporter builds.
DEFAULT_OPSET = {ORT: 18, ATC: 13, ASCEND: 17}
OPSETS = {ORT: range(18, 24), ATC: range(11, 19), ASCEND: range(11, 19)}

# Other forms of the same computation, see export/rewrites.py.
ROWS, PACKED, PADDED, TANH_GELU = "rows", "packed", "padded", "tanh-gelu"
REWRITES = (ROWS, PACKED, PADDED, TANH_GELU)

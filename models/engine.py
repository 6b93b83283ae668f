"""What every session of ONNX Runtime that runs one of our graphs is made with. Imports neither torch nor ONNX Runtime."""

from __future__ import annotations

# By provider. ONNX Runtime's fused Add + LayerNorm runs eight times as long on a CPU as the two kernels it replaces: without
# the fusion `itm_cached` takes 7 % less time at base size (64 captions of 12 tokens, one thread).
DISABLED_OPTIMIZERS: dict[str, list[str]] = {"cpu": ["SkipLayerNormFusion"]}

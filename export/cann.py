"""What the releases of CANN differ in, as far as a command for ATC depends on it.

Opsets: the `--framework` page of ATC's manual for each release. Names of precisions: its `--precision_mode` and
`--precision_mode_v2` pages; the second option does not exist in the tools of CANN 6.0.
"""

from __future__ import annotations

RELEASES = (6, 7, 8)
DEFAULT_RELEASE = 8
OPSETS_READ = {6: range(9, 14), 7: range(9, 19), 8: range(11, 19)}

FP16, MIXED, ORIGIN = "fp16", "mixed_float16", "origin"
PRECISIONS = (FP16, MIXED, ORIGIN)
OLD_NAMES = {FP16: "force_fp16", MIXED: "allow_mix_precision", ORIGIN: "must_keep_origin_dtype"}


def precision_option(cann: int, precision: str) -> str:
    """The option that asks ATC of release `cann` for one of PRECISIONS."""
    return f"--precision_mode={OLD_NAMES[precision]}" if cann < 7 else f"--precision_mode_v2={precision}"

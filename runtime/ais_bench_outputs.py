"""What ais_bench wrote of a whole retrieval run, as the outputs that `blip-run retrieval` would have left. Needs no engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.dataset import RetrievalData
from runtime.ais_bench import npu_seconds
from runtime.ais_bench_pairs import read_pairs
from runtime.ais_bench_run import ITM, TEXT_EMBED, AisRun
from runtime.outputs import LAVIS, RetrievalOutputs
from runtime.plan import plan_pairs

SHOWN = 10  # candidates of each query when nothing was re-ranked


def read_outputs(run: AisRun, data: RetrievalData, pairs: Path | None, verify: bool = False) -> RetrievalOutputs:
    """The embeddings, and the scores of the folder `pairs`. Without one the candidates are ordered by similarity alone: their
    logits are 0, and `run` says "reranked": False.

    Raises UserError when a file is missing, surplus, of another size, or of other samples, and when the folders do not belong
    together.
    """
    image_embed, text_embed = run.embeddings(data)
    if pairs is None:
        k = int(run.content["k_test"])
        plan = plan_pairs(image_embed, text_embed, min(k, SHOWN))
        logits = np.zeros((len(plan.image), 2), np.float32)
    else:
        found = read_pairs(pairs, run, verify)
        k, plan, logits = found.k_test, found.plan, found.logits(run)
    source = replace(run.source, content=_content(run, data, k, len(plan.image), pairs is not None))
    return RetrievalOutputs(source, image_embed, text_embed, plan.image, plan.text, plan.direction, plan.sim, logits)


def _content(run: AisRun, data: RetrievalData, k: int, pairs: int, reranked: bool) -> dict[str, Any]:
    """As a manifest of outputs/ has it, see runtime.run.Run.complete. Seconds are the NPU's alone."""
    content = run.content
    stages = []
    for graph in content["made_of"]["used"]:
        if (run.ais / graph).is_dir() and (graph != ITM or reranked):
            items = {ITM: pairs, TEXT_EMBED: len(data.captions)}.get(graph, len(data.images))
            seconds = round(npu_seconds(run.ais / graph), 4)
            stages.append({"stage": f"{graph}, on the NPU", "items": items, "seconds": seconds, "resumed": 0})
    return {
        "task": "retrieval",
        "graphs": content["made_of"],
        "data": content["data"],
        "backend": content["backend"],
        "timings": stages,
        "k_test": k,
        "protocol": LAVIS,
        "reranked": reranked,
    }

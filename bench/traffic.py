"""How many bytes a decoder cannot but read for one step, counted from its ONNX file and the sizes of its inputs.

Counted are the weights that are multiplied with (MatMul, Gemm), once each for all rows of a step, and the keys and values that
are looked up. Left out is what is small or comes from the caches of the processor: rows of tables that words look up, biases,
norms, and what one operator leaves for the next.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from bench.forms import Load, bind, decode_sizes, places_of
from models.generation_spec import BEAMS, CROSS, PAST, PROMPT_KV
from models.spec import BATCH, GraphSpec
from runtime.decoders import parts_of
from runtime.graphs import Graphs, all_sizes

MULTIPLIED = ("MatMul", "Gemm")
KEPT = ("past", "cross_kv", PROMPT_KV)  # begin the names of keys and values; past.0.key, or past where they are one tensor


def step_bytes(graphs: Graphs, load: Load, beams: int, new: int, use_past: bool) -> float:
    """Bytes that a step reads, on average over the steps of `new` words after prompts of load.length tokens."""
    name = parts_of(graphs).write[-1]
    weights = weights_read(graphs.path(name))
    if graphs.is_static:  # its buffer is looked up whole, and the graph runs as often as its rows take
        sizes = all_sizes(graphs, name)
        prompts = load.batchsize * (1 if BEAMS in sizes else beams)  # or rows, where the graph has one axis for both
        sizes = {BATCH: prompts, **sizes}  # one run takes all when the batch was left open
        return -(-prompts // sizes[BATCH]) * float(weights + kept_read(bind(graphs.symbolic[name], sizes)))
    places, spec = places_of(graphs, load.length), graphs.symbolic[name]
    steps = [decode_sizes(places, load.batchsize, beams, words) for words in range(new - 1)]
    without = {PAST: 0, CROSS: 0} if places.shared else {PAST: 0}
    kept = [kept_read(bind(spec, sizes if use_past else {**sizes, **without})) for sizes in steps]
    return weights + float(np.mean(kept))


def weights_read(path: Path) -> int:
    """Bytes of the weights in `path` that products read; weights in a file beside it are not read for this."""
    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {t.name: math.prod(t.dims) * tensor_dtype_to_np_dtype(t.data_type).itemsize for t in graph.initializer}
    return sum(sizes.get(name, 0) for node in graph.node if node.op_type in MULTIPLIED for name in node.input)


def kept_read(bound: GraphSpec) -> int:
    """Bytes of the keys and values that a graph is given, every axis of which is a number."""
    kept = [t for t in bound.inputs if t.name.partition(".")[0] in KEPT]
    return sum(math.prod(int(dim) for dim in t.shape) * np.dtype(t.dtype).itemsize for t in kept)

"""A graph without its weights, for tracing: only their shapes are looked at, and a language model's fill the memory."""

from __future__ import annotations

import torch

from export.graphs import Graph
from export.random_scene import Model
from models.config import RetrievalConfig
from models.fit import generator_of, retrieval_of


def hollow(graph: Graph) -> Graph:
    """The same computation by a model of the same sizes in float32. Each of its weights is a single number in memory, that
    stands at every place; no two are equal, or the exporters would take one for the other."""
    config = graph.model.cfg
    with torch.device("meta"):
        model: Model = retrieval_of(config) if isinstance(config, RetrievalConfig) else generator_of(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    numbers = {name: torch.tensor(float(n)).expand(shape) for n, (name, shape) in enumerate(shapes.items())}
    model.load_state_dict(numbers, assign=True)
    return Graph(graph.compute, model.requires_grad_(False)).eval()

"""The graphs: the one place where a graph's name, its inputs and outputs, their dtypes and shapes are typed.

ONNX names, data files, ATC commands, session feeds, tests and the README table all read it. Axes: B batch, L text
length (both symbolic), T image tokens, D width, S image size, H heads, K head width, E embedding, Q queries of the Q-Former.
The graphs that write words are in models/generation_spec.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.config import Blip2Config, BlipConfig, Config, RetrievalConfig, VisionConfig
from models.errors import UserError

Dim = int | str  # a str is symbolic: "B" or "L"
BATCH, LENGTH = "B", "L"
MATCH = 1  # the class of itm_logits that says: this caption is of this picture


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. The first axis of `shape` is the batch; `Dim`s that are names are bound at run time."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[Dim, ...]

    @property
    def sample_shape(self) -> tuple[Dim, ...]:
        """Shape of one sample: without the batch axis."""
        return self.shape[1:]

    def bind(self, batch: int, length: int, **others: int) -> TensorSpec:
        """The same tensor with its symbolic axes set; those of `others` by their letters."""
        sizes = {BATCH: batch, LENGTH: length, **others}
        return TensorSpec(self.name, self.dtype, tuple(_bound(dim, sizes) for dim in self.shape))


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file is `<name>.onnx`, its inputs and outputs bear these names in this order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def output(self, name: str) -> TensorSpec:
        """The output of that name, which the graph has."""
        (found,) = (tensor for tensor in self.outputs if tensor.name == name)
        return found

    def bind(self, batch: int, length: int, **others: int) -> GraphSpec:
        """The static form: every axis a number. `others` sets, by their letters, the axes that only some graphs have."""
        return GraphSpec(
            self.name,
            tuple(t.bind(batch, length, **others) for t in self.inputs),
            tuple(t.bind(batch, length, **others) for t in self.outputs),
        )

    @property
    def is_static(self) -> bool:
        """Whether every axis of the inputs is a number: such a graph runs at one batch and one text length alone."""
        return all(isinstance(d, int) for t in self.inputs for d in t.shape)


def graph_specs(config: Config, static: bool = False) -> dict[str, GraphSpec]:
    """Every graph that `config` can be cut into, by name, in the order they are used. The names follow the Ascend
    recipe (text_ids, text_atten_mask, input_image, text_embed, image_embed, image_feat) where it has them.

    Graphs that write words have another form when they are `static`, with axes that can be bound; others have one form."""
    # Imported here: it builds on this module.
    from models.generation_spec import generation_specs

    if isinstance(config, Blip2Config):
        specs = _blip2_specs(config)
    elif isinstance(config, BlipConfig):
        specs = _blip_specs(config)
    else:
        specs = generation_specs(config, static)
    return {spec.name: spec for spec in specs}


def _blip_specs(config: BlipConfig) -> tuple[GraphSpec, ...]:
    ids, mask, image, text_embed, feat, logits = _common(config)
    image_embed = TensorSpec("image_embed", "float32", (BATCH, config.embed))
    cross_kv, one_kv = _cross_kv(config, config.text.depth)
    return (
        GraphSpec("text_embed", (ids, mask), (text_embed,)),
        GraphSpec("image_embed", (image,), (image_embed,)),
        GraphSpec("image_feat", (image,), (feat,)),
        GraphSpec("image", (image,), (image_embed, feat)),
        GraphSpec("image_kv", (feat,), (cross_kv,)),
        GraphSpec("itm", (ids, mask, feat), (logits,)),
        GraphSpec("itm_cached", (ids, mask, one_kv), (logits,)),
    )


def _blip2_specs(config: Blip2Config) -> tuple[GraphSpec, ...]:
    ids, mask, image, text_embed, feat, logits = _common(config)
    queries, width = config.qformer.queries, config.qformer.width
    query_embed = TensorSpec("query_embed", "float32", (BATCH, queries, width))
    image_embed = TensorSpec("image_embed", "float32", (BATCH, queries, config.embed))
    cross_kv, one_kv = _cross_kv(config, len(config.qformer.cross_layers))
    text_feat = TensorSpec("text_feat", "float32", (BATCH, LENGTH, width))
    text_feat_proj = TensorSpec("text_feat_proj", "float32", (BATCH, LENGTH, config.embed))
    multimodal = TensorSpec("multimodal_embed", "float32", (BATCH, queries, width))
    return (
        GraphSpec("text_embed", (ids, mask), (text_embed,)),
        GraphSpec("image_feat", (image,), (feat,)),
        GraphSpec("qformer", (feat,), (query_embed, image_embed)),
        GraphSpec("image", (image,), (query_embed, image_embed, feat)),
        GraphSpec("image_kv", (feat,), (cross_kv,)),
        GraphSpec("itm", (ids, mask, feat), (logits,)),
        GraphSpec("itm_cached", (ids, mask, one_kv), (logits,)),
        GraphSpec("text_feat", (ids, mask), (text_feat, text_feat_proj)),
        GraphSpec("multimodal", (ids, mask, feat), (multimodal,)),
    )


def _common(config: RetrievalConfig) -> tuple[TensorSpec, ...]:
    """What the graphs of both models pass on."""
    image, feat = picture_tensors(config.vision)
    return (
        TensorSpec("text_ids", "int64", (BATCH, LENGTH)),
        TensorSpec("text_atten_mask", "int64", (BATCH, LENGTH)),
        image,
        TensorSpec("text_embed", "float32", (BATCH, config.embed)),
        feat,
        TensorSpec("itm_logits", "float32", (BATCH, 2)),
    )


def picture_tensors(vision: VisionConfig) -> tuple[TensorSpec, TensorSpec]:
    """input_image, and image_feat that the encoder makes of it."""
    size = vision.image_size
    return (
        TensorSpec("input_image", "float32", (BATCH, 3, size, size)),
        TensorSpec("image_feat", "float32", (BATCH, vision.tokens, vision.width)),
    )


def _cross_kv(config: RetrievalConfig, layers: int) -> tuple[TensorSpec, TensorSpec]:
    """Keys of the first layer with cross-attention, its values, keys of the next one, ...: of B pictures, and of ONE."""
    heads = config.text.heads
    shape = (2 * layers, heads, config.vision.tokens, config.text.width // heads)
    return TensorSpec("cross_kv", "float32", (BATCH, *shape)), TensorSpec("cross_kv", "float32", (1, *shape))


def _bound(dim: Dim, sizes: Mapping[str, int]) -> Dim:
    """A size in place of an axis that `sizes` says, or of a sum or product of such axes."""
    if isinstance(dim, int) or dim in sizes:
        return dim if isinstance(dim, int) else sizes[dim]
    terms = [[sizes.get(letter, letter) for letter in term.split("*")] for term in dim.split("+")]
    numbers = [[int(factor) for factor in term if str(factor).isdigit()] for term in terms]
    if [len(term) for term in terms] != [len(found) for found in numbers]:
        return dim
    return sum(math.prod(term) for term in numbers)


def spec_to_dict(spec: GraphSpec) -> dict[str, Any]:
    """JSON form of a spec, as a manifest keeps it."""

    def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in specs]

    return {"inputs": tensors(spec.inputs), "outputs": tensors(spec.outputs)}


def spec_from_dict(name: str, values: dict[str, Any]) -> GraphSpec:
    """Read `spec_to_dict`'s form back. Raises UserError when it is not that form."""

    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(str(t["name"]), np.dtype(t["dtype"]).name, tuple(_dim(d) for d in t["shape"])) for t in values[key]
        )

    try:
        return GraphSpec(name, tensors("inputs"), tensors("outputs"))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The manifest describes the graph {name!r} wrongly: {error}. Write the graphs again with blip-export."
        ) from error


def _dim(value: object) -> Dim:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{value!r} is not the size of an axis")
    return value

"""The graphs: the one place where a graph's name, its inputs and outputs, their dtypes and shapes are typed.

ONNX names, data files, ATC commands, session feeds, tests and the README table all read it. Axes: B batch, L text
length (both symbolic), T image tokens, D image width, S image size, H heads, K head width, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.config import BlipConfig
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

    def bind(self, batch: int, length: int) -> TensorSpec:
        """The same tensor with its symbolic axes set."""
        sizes: dict[Dim, int] = {BATCH: batch, LENGTH: length}
        return TensorSpec(self.name, self.dtype, tuple(sizes.get(d, d) for d in self.shape))


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file is `<name>.onnx`, its inputs and outputs bear these names in this order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def bind(self, batch: int, length: int) -> GraphSpec:
        """The static form: every axis a number."""
        return GraphSpec(
            self.name,
            tuple(t.bind(batch, length) for t in self.inputs),
            tuple(t.bind(batch, length) for t in self.outputs),
        )

    @property
    def is_static(self) -> bool:
        """Whether every axis of the inputs is a number: such a graph runs at one batch and one text length alone."""
        return all(isinstance(d, int) for t in self.inputs for d in t.shape)


def graph_specs(config: BlipConfig) -> dict[str, GraphSpec]:
    """Every graph that `config` can be cut into, by name, in the order they are used. The names follow the Ascend
    recipe (text_ids, text_atten_mask, input_image, text_embed, image_embed, image_feat) where it has them."""
    vision, text = config.vision, config.text
    head = text.width // text.heads
    ids = TensorSpec("text_ids", "int64", (BATCH, LENGTH))
    mask = TensorSpec("text_atten_mask", "int64", (BATCH, LENGTH))
    image = TensorSpec("input_image", "float32", (BATCH, 3, vision.image_size, vision.image_size))
    text_embed = TensorSpec("text_embed", "float32", (BATCH, config.embed))
    image_embed = TensorSpec("image_embed", "float32", (BATCH, config.embed))
    feat = TensorSpec("image_feat", "float32", (BATCH, vision.tokens, vision.width))
    # Keys of layer 0, values of layer 0, keys of layer 1, ...
    kv_shape = (2 * text.depth, text.heads, vision.tokens, head)
    cross_kv = TensorSpec("cross_kv", "float32", (BATCH, *kv_shape))
    one_kv = TensorSpec("cross_kv", "float32", (1, *kv_shape))  # of ONE picture
    logits = TensorSpec("itm_logits", "float32", (BATCH, 2))
    specs = (
        GraphSpec("text_embed", (ids, mask), (text_embed,)),
        GraphSpec("image_embed", (image,), (image_embed,)),
        GraphSpec("image_feat", (image,), (feat,)),
        GraphSpec("image", (image,), (image_embed, feat)),
        GraphSpec("image_kv", (feat,), (cross_kv,)),
        GraphSpec("itm", (ids, mask, feat), (logits,)),
        GraphSpec("itm_cached", (ids, mask, one_kv), (logits,)),
    )
    return {spec.name: spec for spec in specs}


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

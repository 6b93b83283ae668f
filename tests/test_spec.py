"""Graph specs: shapes that follow from the configuration, and their way through a manifest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.errors import UserError
from models.presets import preset
from models.spec import graph_specs, spec_from_dict, spec_to_dict
from tests.tiny import TINY

SPECS = graph_specs(TINY)


def test_names_are_those_of_the_ascend_recipe() -> None:
    assert list(SPECS) == ["text_embed", "image_embed", "image_feat", "image", "image_kv", "itm", "itm_cached"]
    assert all(spec.name == name for name, spec in SPECS.items())
    assert [t.name for t in SPECS["itm"].inputs] == ["text_ids", "text_atten_mask", "image_feat"]
    assert [t.name for t in SPECS["image"].outputs] == ["image_embed", "image_feat"]


def test_what_one_graph_gives_the_next_one_takes() -> None:
    feat, cross_kv = SPECS["image"].outputs[1], SPECS["image_kv"].outputs[0]
    assert SPECS["image_kv"].inputs == (feat,)
    assert SPECS["itm"].inputs[2] == feat
    cached = SPECS["itm_cached"].inputs[2]
    assert (cached.name, cached.dtype, cached.sample_shape) == (cross_kv.name, cross_kv.dtype, cross_kv.sample_shape)
    assert cached.shape[0] == 1  # one picture, however many captions


def test_shapes_follow_the_configuration() -> None:
    specs = graph_specs(preset("blip-retrieval-large-coco"))
    assert specs["image"].inputs[0].shape == ("B", 3, 384, 384)
    assert specs["image_feat"].outputs[0].shape == ("B", 577, 1024)
    assert specs["image_kv"].outputs[0].shape == ("B", 24, 12, 577, 64)
    assert specs["text_embed"].outputs[0].shape == ("B", 256)


def test_an_output_by_its_name() -> None:
    for spec in SPECS.values():
        assert [spec.output(tensor.name) for tensor in spec.outputs] == list(spec.outputs)
    with pytest.raises(ValueError, match="unpack"):
        SPECS["image"].output("itm_logits")


def test_bind_sets_every_axis() -> None:
    for spec in SPECS.values():
        assert not spec.is_static
        bound = spec.bind(batch=4, length=9)
        assert bound.is_static
        assert bound.name == spec.name
        assert all(isinstance(d, int) for t in (*bound.inputs, *bound.outputs) for d in t.shape)
        assert bound.bind(5, 7) == bound
    ids, mask, kv = SPECS["itm_cached"].bind(4, 9).inputs
    assert (ids.shape, mask.shape, kv.shape) == ((4, 9), (4, 9), (1, 4, 4, 17, 10))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bound", [False, True], ids=["dynamic", "static"])
def test_round_trip(name: str, bound: bool) -> None:
    spec = SPECS[name].bind(2, 5) if bound else SPECS[name]
    assert spec_from_dict(name, json.loads(json.dumps(spec_to_dict(spec)))) == spec


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("outputs"),
        lambda d: d.update(inputs=3),
        lambda d: d.update(inputs=["text_ids"]),
        lambda d: d["inputs"][0].pop("name"),
        lambda d: d["inputs"][0].update(dtype="float33"),
        lambda d: d["inputs"][0].update(shape=None),
        lambda d: d["inputs"][0].update(shape=["B", 1.5]),
        lambda d: d["inputs"][0].update(shape=["B", None]),
    ],
)
def test_damaged_description(change: Any) -> None:
    values = json.loads(json.dumps(spec_to_dict(SPECS["itm"])))
    change(values)
    with pytest.raises(UserError, match=r"describes the graph 'itm' wrongly: .* Write the graphs again with blip-export"):
        spec_from_dict("itm", values)

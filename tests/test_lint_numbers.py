"""The lint's rules about numbers: what float16 does not hold, and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.test_lint import lint, node, planted, told


@pytest.mark.parametrize("value", [1e9, -1e9, float("-inf"), float(np.finfo(np.float32).min), 65505.0, float("nan")])
def test_a_mask_that_fp16_does_not_hold(value: float) -> None:
    mask = node("Constant", [], ["large"], "mask", value_float=value)
    for model in (planted(mask=np.array(value, np.float32)), planted(mask, node("Add", ["x", "large"], ["y"], "masked"))):
        said = told(lint(model), "fp16")
        assert "beyond fp16's 65504" in said
    assert "Add 'masked'" in said
    assert lint(planted(mask=np.array(-65504, np.float32))) == {}


def norm(eps: str = "eps") -> list[onnx.NodeProto]:
    """Layer norm as the exporter writes it below opset 17."""
    return [
        node("ReduceMean", ["x"], ["mean"], axes=[-1]),
        node("Sub", ["x", "mean"], ["centred"]),
        node("Pow", ["centred", "two"], ["square"]),
        node("ReduceMean", ["square"], ["variance"], axes=[-1]),
        node("Add", ["variance", eps], ["above"], "above"),
        node("Sqrt", ["above"], ["deviation"]),
        node("Div", ["centred", "deviation"], ["y"]),
    ]


def test_an_eps_that_vanishes() -> None:
    small: dict[str, Any] = {"eps": np.array(1e-12, np.float32), "two": np.array(2, np.float32)}
    guard = [
        node("ReduceSum", ["x"], ["sum"]),
        node("Clip", ["sum", "eps"], ["above"], "guard"),
        node("Div", ["x", "above"], ["y"]),
    ]
    said = told(lint(planted(*guard, **small)), "fp16")
    assert "'eps' of Clip 'guard' is 1e-12" in said
    assert lint(planted(*guard, eps=np.array(1e-6, np.float32))) == {}
    assert lint(planted(*norm(), **small)) == {}
    also = [*norm()[:-1], node("Div", ["centred", "deviation"], ["z"]), node("Add", ["z", "eps"], ["y"], "other")]
    assert "Add 'other'" in told(lint(planted(*also, **small)), "fp16")


# Whole numbers that become floating point.


def masked(*nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x + what `nodes` make of a mask, as large."""
    return [*nodes, node("Add", ["x", "large"], ["y"], "masked")]


@pytest.mark.parametrize("value", [10**9, -(10**9), 65505])
def test_a_whole_number_that_becomes_a_mask(value: int) -> None:
    number = np.array(value, np.int64)
    cast = masked(node("Cast", ["number"], ["large"], "cast", to=TensorProto.FLOAT))
    said = told(lint(planted(*cast, number=number)), "fp16")
    assert f"'number' of Cast 'cast' holds {abs(value):.6g}, of which Cast 'cast' makes a float beyond fp16's 65504." in said
    assert lint(planted(*cast, number=np.array(-65504, np.int64))) == {}
    constant = masked(
        node("Constant", [], ["number"], value_int=value), node("Cast", ["number"], ["large"], "cast", to=TensorProto.FLOAT16)
    )
    assert told(lint(planted(*constant[:-1], node("Cast", ["large"], ["wide"], to=1), node("Add", ["x", "wide"], ["y"]))), "fp16")


def test_a_whole_number_on_its_way() -> None:
    """(1 - mask) * 10**9, computed in int64 and cast at the end."""
    nodes = [
        node("Sub", ["one", "text_ids"], ["hidden"]),
        node("Mul", ["hidden", "number"], ["product"], "product"),
        node("Unsqueeze", ["product", "last_axis"], ["wide"]),
        node("Cast", ["wide"], ["large"], "cast", to=TensorProto.FLOAT),
    ]
    numbers = {"one": np.array(1), "number": np.array(-(10**9)), "last_axis": np.array([-1])}
    assert "'number' of Mul 'product' holds 1e+09, of which Cast 'cast'" in told(
        lint(planted(*masked(*nodes), **numbers)), "fp16"
    )
    assert lint(planted(*masked(*nodes), **{**numbers, "number": np.array(-10_000)})) == {}


def test_whole_numbers_that_are_none_of_the_mask() -> None:
    """The end of a slice, which means to the last; and one that stays whole."""
    numbers = {"from": np.array([0]), "end": np.array([2**63 - 1]), "last_axis": np.array([-1]), "large_id": np.array(10**9)}
    nodes = [
        node("Slice", ["text_ids", "from", "end"], ["part"]),
        node("Less", ["part", "large_id"], ["known"]),
        node("Cast", ["known"], ["ones"], to=TensorProto.FLOAT),
        node("Cast", ["part"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["ones", "floats"], ["mask_of"]),
        node("Unsqueeze", ["mask_of", "last_axis"], ["large"]),
    ]
    assert lint(planted(*masked(*nodes), **numbers)) == {}


# float64


def test_what_is_computed_in_float64() -> None:
    up, down = node("Cast", ["x"], ["wide"], to=TensorProto.DOUBLE), node("Cast", ["root"], ["y"], to=TensorProto.FLOAT)
    said = told(lint(planted(up, node("Sqrt", ["wide"], ["root"], "root"), down)), "float64")
    assert said == "Sqrt 'root' computes with 'wide' in float64. Cast to float32 before it."
    assert lint(planted(up, node("Identity", ["wide"], ["root"]), down)) == {}
    number = node("Cast", ["two"], ["narrow"], to=TensorProto.FLOAT)
    assert lint(planted(number, node("Mul", ["x", "narrow"], ["y"]), two=np.array(2.0))) == {}
    compared = [up, node("Less", ["wide", "two"], ["few"], "few"), node("Cast", ["few"], ["y"], to=TensorProto.FLOAT)]
    assert told(lint(planted(*compared, two=np.array(2.0))), "float64").startswith("Less 'few' computes with 'wide'")

"""A session of an .om file, over both years' front ends of ais_bench: what is checked that ais_bench does not check.

The graph is small and made by hand: words (2, 3) int64 and a picture (2, 4) float32 to a sum and a product.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models.errors import UserError
from models.om import DYNAMIC_BATCH, DYNAMIC_DIMS, OmEntry
from models.spec import GraphSpec, TensorSpec
from runtime import devices
from runtime.devices import open_om
from runtime.om_session import OmBackend, infer_session
from tests.om_folder import GENERATIONS, ais_bench, cast_input, half_outputs, turned_round

IDS, PICTURE = TensorSpec("text_ids", "int64", ("B", 3)), TensorSpec("input_image", "float32", ("B", 4))
ONE = TensorSpec("cross_kv", "float32", (1, 4))  # for every row
SUM, PRODUCT = TensorSpec("words", "float32", ("B", 3)), TensorSpec("seen", "float32", ("B", 4))
SYMBOLIC = GraphSpec("itm", (IDS, PICTURE, ONE), (SUM, PRODUCT))
SPEC = SYMBOLIC.bind(2, 3)


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest) -> Iterator[str]:
    with ais_bench(request.param):
        yield request.param


@pytest.fixture
def path(tmp_path: Path, generation: str) -> Path:
    return write(tmp_path / "itm_bs2.om", SPEC)


def write(path: Path, spec: GraphSpec, unused: str | None = None) -> Path:
    """The file of the graph; without the input `unused`, which then counts for nothing."""
    constants = [helper.make_tensor("one", TensorProto.FLOAT, [1, 4], [1.0] * 4)]
    nodes = [
        helper.make_node("Gather", ["table", "text_ids"], ["words"]),
        helper.make_node("Mul", ["input_image", "one" if unused == "cross_kv" else "cross_kv"], ["seen"]),
    ]
    constants.append(helper.make_tensor("table", TensorProto.FLOAT, [9], [n / 2 for n in range(9)]))
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    values = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in tensors if t.name != unused]
        for tensors in (spec.inputs, spec.outputs)
    ]
    graph = helper.make_graph(nodes, spec.name, *values, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    path.chmod(0o640)
    return path


def feeds(rows: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    return {
        "text_ids": random.integers(0, 9, (rows, 3)),
        "input_image": random.normal(size=(rows, 4)).astype(np.float32),
        "cross_kv": random.normal(size=(1, 4)).astype(np.float32),
    }


def right(found: list[np.ndarray], given: dict[str, np.ndarray]) -> None:
    words, seen = found
    assert words.dtype == seen.dtype == np.float32
    np.testing.assert_array_equal(words, (given["text_ids"] / 2).astype(np.float32))
    np.testing.assert_array_equal(seen, given["input_image"] * given["cross_kv"])


def refused(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in error.value.message
    return error.value.message


def test_it_runs(path: Path) -> None:
    backend = OmBackend(path, SPEC, 0)
    for rows in range(3):
        given = {name: array + rows if name == "input_image" else array for name, array in feeds().items()}
        right(backend.run(given), given)
    assert backend.notes == []
    assert len(backend.npu_ms()) == 3
    assert all(isinstance(ms, float) and 0 < ms < 60_000 for ms in backend.npu_ms())


def test_arrays_are_put_in_a_row(path: Path, generation: str) -> None:
    """The front end of 2023 reads a transposed array as it lies in memory."""
    given = feeds()
    turned = {**given, "input_image": np.ascontiguousarray(given["input_image"].T).T}
    assert not turned["input_image"].flags.c_contiguous
    right(OmBackend(path, SPEC, 0).run(turned), given)
    (_, seen) = infer_session()(0, str(path)).infer([turned[tensor.name] for tensor in SPEC.inputs])
    wrong = not np.array_equal(seen, given["input_image"] * given["cross_kv"])
    assert wrong == (generation == "2023")


def test_wrong_dtypes_do_not_reach_ais_bench(path: Path) -> None:
    backend, given = OmBackend(path, SPEC, 0), feeds()
    for dtype, size in (("int32", 24), ("float64", 48)):
        said = refused(lambda dtype=dtype: backend.run({**given, "text_ids": given["text_ids"].astype(dtype)}))  # type: ignore[misc]
        assert said == f"itm: text_ids is {dtype} [2, 3], {size} bytes; {path} takes int64 [2, 3], 48 bytes."
    assert "input_image is float32 [4, 2], 32 bytes" in refused(
        lambda: backend.run({**given, "input_image": np.zeros((4, 2), "f")})
    )
    # As many bytes are garbage to ais_bench, and no error: what is checked here is checked nowhere else.
    floats = [given["text_ids"].astype(np.float64) * 0, given["input_image"], given["cross_kv"]]
    assert infer_session()(0, str(path)).infer(floats)[0].shape == (2, 3)
    with pytest.raises(RuntimeError, match="ACL: general failure"):
        infer_session()(0, str(path)).infer([given["text_ids"].astype(np.int32), *floats[1:]])


def test_an_int32_file(path: Path) -> None:
    cast_input("text_ids", TensorProto.INT32)(path, SPEC)
    said = refused(lambda: OmBackend(path, SPEC, 0))
    assert said == f"itm: {path} takes text_ids as int32; expected int64. Compile the graph again with blip-atc."


def test_other_order(path: Path) -> None:
    turned_round(path, SPEC)
    given = feeds()
    right(OmBackend(path, SPEC, 0).run(given), given)


def renamed(path: Path, *names: str) -> None:
    """Other names for the outputs, in order."""
    model = onnx.load(path)
    for value, node, name in zip(model.graph.output, model.graph.node, names, strict=True):
        value.name = node.output[0] = name
    onnx.save(model, path)


def test_outputs_without_their_names_go_by_place(path: Path) -> None:
    renamed(path, "output_0", "output_1")
    given = feeds()
    right(OmBackend(path, SPEC, 0).run(given), given)


def test_outputs_that_are_not_the_graph_s(path: Path) -> None:
    renamed(path, "seen", "other")
    assert "seen is in another place" in refused(lambda: OmBackend(path, SPEC, 0))
    surplus = replace(SPEC, outputs=SPEC.outputs[:1])
    assert "gives 2 outputs, seen, other; expected words" in refused(lambda: OmBackend(path, surplus, 0))


def test_an_input_that_was_pruned(path: Path) -> None:
    write(path, SPEC, unused="cross_kv")
    backend, given = OmBackend(path, SPEC, 0), feeds()
    assert backend.notes == [f"{path} does not take cross_kv: the compiler found it unused, it is not fed."]
    right(backend.run(given), {**given, "cross_kv": np.ones((1, 4), np.float32)})


def test_an_input_that_is_not_the_graph_s(path: Path) -> None:
    fewer = replace(SPEC, inputs=SPEC.inputs[:2])
    assert "takes an input 'cross_kv'; expected text_ids, input_image" in refused(lambda: OmBackend(path, fewer, 0))


def test_another_batch(path: Path) -> None:
    assert "takes text_ids of shape [2, 3]; expected [4, 3]" in refused(lambda: OmBackend(path, SYMBOLIC.bind(4, 3), 0))


def test_half_precision(path: Path) -> None:
    """Outputs are widened; inputs are narrowed where the manifest says so, and only there."""
    half_outputs(path, SPEC)
    given = {**feeds(), "input_image": np.full((2, 4), 0.5, np.float32), "cross_kv": np.full((1, 4), 3, np.float32)}
    right(OmBackend(path, SPEC, 0).run(given), given)
    cast_input("input_image", TensorProto.FLOAT16)(path, SPEC)
    assert "takes input_image as float16; expected float32" in refused(lambda: OmBackend(path, SPEC, 0))
    half = replace(SPEC, inputs=(SPEC.inputs[0], replace(SPEC.inputs[1], dtype="float16"), SPEC.inputs[2]))
    backend = OmBackend(path, half, 0)
    right(backend.run(given), given)
    said = refused(lambda: backend.run({**given, "input_image": np.full((2, 4), 7e4, np.float32)}))
    assert said.startswith("itm: input_image holds 7e+04, beyond float16")


def test_failures_of_the_npu(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = OmBackend(path, SPEC, 3)
    said = refused(lambda: backend.run({**feeds(), "text_ids": np.full((2, 3), 10**6)}))
    assert said.startswith(f"itm failed on NPU 3 ({path}): [-1][ACL: general failure].")
    path.write_bytes(b"no model")
    assert refused(lambda: OmBackend(path, SPEC, 1)).startswith(f"{path} cannot be loaded on NPU 1: [-1][ACL: general failure].")


def test_a_file_of_another_user(path: Path, generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that of today looks."""
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "getgroups", lambda: [path.stat().st_gid])
    OmBackend(path, SPEC, 0)  # of a group of theirs
    monkeypatch.setattr(os, "getgroups", lambda: [path.stat().st_gid + 1])
    if generation == "2023":
        OmBackend(path, SPEC, 0)
        return
    said = refused(lambda: OmBackend(path, SPEC, 0))
    assert said.startswith(f"{path} cannot be loaded on NPU 0: model path:{path} is illegal. ")
    assert "files of this user or group that nobody else can write" in said


def test_without_ais_bench(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ais_bench.infer.interface", None)
    said = refused(lambda: OmBackend(path, SPEC, 0))
    assert "set_env.sh" in said
    assert "aclruntime and ais_bench" in said
    assert "PyPI has neither" in said


def test_memory_is_given_back(path: Path) -> None:
    """By close(), or when nobody holds the session; others run on."""
    import aclruntime  # type: ignore[import-not-found]

    gc.collect()
    before = len(aclruntime.loaded)
    held, closed = OmBackend(path, SPEC, 0), OmBackend(path, SPEC, 0)
    assert len(aclruntime.loaded) == before + 2
    closed.close()
    closed.close()
    gc.collect()
    assert len(aclruntime.loaded) == before + 1
    assert closed.npu_ms() == []
    given = feeds()
    right(held.run(given), given)
    del held
    gc.collect()
    assert len(aclruntime.loaded) == before


@pytest.mark.parametrize("dynamic", [DYNAMIC_BATCH, DYNAMIC_DIMS])
def test_a_file_for_several_batches(path: Path, dynamic: str) -> None:
    write(path, SYMBOLIC.bind("N", 3))  # type: ignore[arg-type]
    for rows in (2, 5):
        given, backend = feeds(rows), OmBackend(path, SYMBOLIC.bind(rows, 3), 0, dynamic)
        right(backend.run(given), given)
        assert "takes int64" in refused(lambda rows=rows, backend=backend: backend.run(feeds(rows - 1)))  # type: ignore[misc]


def dealt(path: Path, *numbers: int) -> Any:
    return open_om(path.parent, OmEntry("itm", 2, path.name, SPEC, ()), SYMBOLIC, numbers)


def test_several_npus(path: Path) -> None:
    """Rows are dealt out two by two and come back in order; what has no row of its own goes to all; fewer rows, fewer NPUs."""
    backend = dealt(path, 0, 1, 5)
    for rows in (6, 4, 2, 6):
        given = feeds(rows)
        right(backend.run(given), given)
    assert len(backend.npu_ms()) == 4 + 3 + 2
    other = dealt(path, 5, 0)
    given = feeds(4)
    right(other.run(given), given)
    backend.close()
    right(other.run(given), given)


def stopped(workers: Any) -> None:
    raise KeyboardInterrupt


def test_a_failure_on_one_of_several_npus(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and nobody takes the answer of another for his own."""
    backend, given = dealt(path, 0, 1), feeds(4)
    wrong = {**given, "text_ids": np.array([[0] * 3, [0] * 3, [10**6] * 3, [0] * 3])}
    assert "itm failed on NPU 1" in refused(lambda: backend.run(wrong))
    right(backend.run(given), given)
    assert "takes text_ids of shape" in refused(
        lambda: open_om(path.parent, OmEntry("itm", 3, path.name, SYMBOLIC.bind(3, 3), ()), SYMBOLIC, (0, 1))
    )
    # Broken off in the middle, a question leaves no answer behind.
    with monkeypatch.context() as patch:
        patch.setattr(devices, "_answers", stopped)
        with pytest.raises(KeyboardInterrupt):
            backend.run(feeds(2))
    assert "The process that runs NPU 0 has ended" in refused(lambda: backend.run(given))
    backend = dealt(path, 0, 1)
    right(backend.run(given), given)
    os.kill(devices._workers[1]._process.pid, signal.SIGKILL)
    assert "The process that runs NPU 1 has ended with exit status -9." in refused(lambda: backend.run(given))

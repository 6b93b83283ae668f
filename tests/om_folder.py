"""om/ folders without a converter: graphs of fixed size under the names that blip-atc would give them, run by tests/doubles/."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models import manifest
from models.om import KIND, OmEntry, entry_to_dict, om_stem
from models.spec import BATCH, GraphSpec
from runtime import devices
from runtime.graphs import all_sizes, read_graphs

DOUBLES = Path(__file__).parent / "doubles"
GENERATIONS = ("2023", "2025")
SOC = "Ascend310P3"

# What is done to the file of a graph after it was copied; its spec, with what is to stand in the manifest.
Change = Callable[[Path, GraphSpec], GraphSpec]


def front_end(generation: str) -> tuple[list[str], str]:
    """Where ais_bench is imported from, and its year: the stand-in of `generation`, or that whose source AIS_BENCH_SRC names,
    whatever was asked for. Either is over the stand-in for aclruntime."""
    source = os.environ.get("AIS_BENCH_SRC")
    if not source:
        return [str(DOUBLES)], generation
    text = (Path(source) / "ais_bench" / "infer" / "interface.py").read_text("utf-8")
    return [source, str(DOUBLES)], "2025" if "def free_resource" in text else "2023"


@contextmanager
def ais_bench(generation: str) -> Iterator[None]:
    """ais_bench of that year, see front_end."""
    with pytest.MonkeyPatch.context() as patch:
        folders, year = front_end(generation)
        for folder in reversed(folders):
            patch.syspath_prepend(folder)
        patch.setenv("AIS_BENCH_GENERATION", year)
        devices.stop_all()  # the processes of an earlier one have its environment
        yield
        devices.stop_all()


def write_om(out: Path, *folders: Path, changed: Mapping[str, Change] | None = None) -> Path:
    """What blip-atc would make of `folders`, written with --target atc for one batch each; returns `out`."""
    found = [read_graphs(folder) for folder in folders]
    shutil.copytree(folders[0], out, ignore=shutil.ignore_patterns("*.onnx", manifest.NAME))
    entries = []
    for graphs in found:
        for name, spec in graphs.written.items():
            batch = all_sizes(graphs, name).get(BATCH, 1)
            file = f"{om_stem(name, [batch])}.om"
            shutil.copyfile(graphs.path(name), out / file)
            (out / file).chmod(0o640)  # ais_bench of today refuses what others may write
            if change := (changed or {}).get(name):
                spec = change(out / file, spec)
            entries.append(OmEntry(name, batch, file, spec, ("atc", f"--model={name}.onnx"), seconds=1.0))
    content = {
        **found[0].content,
        "target": KIND,
        "precision": "origin",
        "soc": SOC,
        "cann": 8,
        "graphs_digest": found[0].source.digest,
        "graphs": {
            name: {key: values[key] for key in ("inputs", "outputs")} for name, values in found[0].content["graphs"].items()
        },
        "oms": [entry_to_dict(entry) for entry in entries],
    }
    out.chmod(0o750)
    manifest.write(out, KIND, content)
    return out


def cast_input(name: str, dtype: int) -> Change:
    """The file takes `name` as `dtype`; the manifest does not say so."""

    def change(path: Path, spec: GraphSpec) -> GraphSpec:
        model = onnx.load(path)
        (value,) = (value for value in model.graph.input if value.name == name)
        was = value.type.tensor_type.elem_type
        for node in model.graph.node:
            node.input[:] = [f"{name}_cast" if each == name else each for each in node.input]
        value.type.tensor_type.elem_type = dtype
        model.graph.node.insert(0, helper.make_node("Cast", [name], [f"{name}_cast"], to=was))
        onnx.save(model, path)
        return spec

    return change


def half_outputs(path: Path, spec: GraphSpec) -> GraphSpec:
    """The file gives float16, as with --output_type=FP16; the manifest does not say so."""
    model = onnx.load(path)
    names = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for edges in (node.input, node.output):
            edges[:] = [f"{each}_wide" if each in names else each for each in edges]
    for value in model.graph.output:
        model.graph.node.append(helper.make_node("Cast", [f"{value.name}_wide"], [value.name], to=TensorProto.FLOAT16))
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path)
    return spec


def turned_round(path: Path, spec: GraphSpec) -> GraphSpec:
    """The file has its inputs and outputs in another order than the manifest says."""
    model = onnx.load(path)
    for values in (model.graph.input, model.graph.output):
        kept = list(values)[::-1]
        del values[:]
        values.extend(kept)
    onnx.save(model, path)
    return spec


def same_tensors(one: Path, other: Path) -> list[str]:
    """The tensors that two outputs/ folders have, each the same to the last bit."""
    names = sorted(path.name for path in one.glob("*.npy"))
    assert names == sorted(path.name for path in other.glob("*.npy"))
    for name in names:
        np.testing.assert_array_equal(np.load(one / name), np.load(other / name), err_msg=name)
    return names

"""`python -m ais_bench` as a user calls it, of the stand-in or of AIS_BENCH_SRC, and a retrieval run that it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import runtime.__main__
from models.spec import GraphSpec
from tests import chain
from tests.om_folder import front_end
from tests.om_graphs import TEXT, onnx_of

K = 5
Done = subprocess.CompletedProcess[str]


def environment(generation: str) -> dict[str, str]:
    """In which `python` is this one, and its ais_bench that of om_folder.front_end."""
    python, (folders, year) = Path(sys.executable).parent, front_end(generation)
    paths = {"PYTHONPATH": os.pathsep.join(folders), "PATH": f"{python}{os.pathsep}{os.environ['PATH']}"}
    return {**os.environ, **paths, "AIS_BENCH_GENERATION": year}


def cli(folder: Path, generation: str, *options: object) -> Done:
    """`python -m ais_bench` in `folder`."""
    argv = [sys.executable, "-m", "ais_bench", *map(str, options)]
    return subprocess.run(argv, cwd=folder, env=environment(generation), capture_output=True, text=True, check=False)


def bash(folder: Path, generation: str, *graphs: str, first: Path | None = None) -> Done:
    """The script in `folder`, called from elsewhere; commands in the folder `first` hide others."""
    env = environment(generation)
    if first:
        env["PATH"] = f"{first}{os.pathsep}{env['PATH']}"
    argv = ["bash", str(folder / "ais_bench.sh"), *graphs]
    return subprocess.run(argv, cwd="/", env=env, capture_output=True, text=True, check=False)


def scripted(om: Path, data: Path, out: Path, *options: object) -> Path:
    """The folder of blip-run ais-bench-script."""
    chain.done(chain.call(runtime.__main__.main, "ais-bench-script", "--om", om, "--data", data, "--out", out, *options))
    return out


def with_pairs(out: Path, data: Path, *options: object) -> str:
    """What blip-run pairs says, of the run in the folder `out`."""
    return chain.done(chain.call(runtime.__main__.main, "pairs", "--data", data, "--ais-bench", out / "ais", *options))


def whole_run(om: Path, data: Path, out: Path, generation: str) -> Path:
    """Both stages, as a user goes through them."""
    scripted(om, data, out)
    for graphs in ((), ("itm_cached",)):
        if graphs:
            with_pairs(out, data, "--k-test", K)
        done = bash(out, generation, *graphs)
        assert done.returncode == 0, done.stderr
    return out


class Counted:
    """The graph om_graphs.TEXT in batches of 4, and ten captions of 5 tokens as files: the golden case of the packing rules."""

    spec: GraphSpec = TEXT.bind(4, 5)
    sources = ("ids", "mask")
    stems = tuple(f"{n:02d}" for n in range(10))

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o750)
        onnx.save(onnx_of(self.spec, 17), folder / "text.om")
        (folder / "text.om").chmod(0o640)
        random = np.random.default_rng(0)
        self.fed = {name: random.integers(1, 9, (10, 5)) for name in ("ids", "mask")}
        for name, rows in self.fed.items():
            self.write(name, rows)

    def write(self, name: str, rows: np.ndarray, together: int = 1) -> None:
        """Files of so many rows each, all of them full."""
        held = self.folder / name
        held.mkdir(exist_ok=True)
        held.chmod(0o750)
        for number in range(0, len(rows), together):
            part = rows[np.minimum(np.arange(number, number + together), len(rows) - 1)]
            path = held / f"{number // together:02d}.bin"
            path.write_bytes(part.tobytes())
            path.chmod(0o640)

    def run(self, generation: str, *options: object) -> Done:
        argv: list[Any] = ["--model", "text.om", "--input", "ids,mask", "--output", "out", "--output_dirname", "text"]
        return cli(self.folder, generation, *argv, *options)

    @property
    def out(self) -> Path:
        return self.folder / "out" / "text"

    def expected(self) -> np.ndarray:
        """(10, 4) float32, what the graph gives of these captions."""
        (weights,) = [onnx.numpy_helper.to_array(held) for held in onnx.load(self.folder / "text.om").graph.initializer]
        return np.asarray((self.fed["ids"] * self.fed["mask"]).astype(np.float32) @ weights)

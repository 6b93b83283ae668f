"""A stand-in for `python -m ais_bench`, over that for aclruntime: how files become batches, and outputs files again.

It follows what is known of the real one, of 2023 and of 2025 (GENERATION in the environment): inputs are paired by place, packed
by bytes, the last batch is filled with copies of its first file, names are cut at the first dot; that of 2025 refuses links and
what others may write. Of the options those that a static or dynamic .om over folders of files needs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import aclruntime
import numpy as np
from ais_bench.infer.interface import is_owned

PADDING = "padding_infer_fake_file"
MOST_FILES = 100_000
Paths = list[str]


def main() -> None:
    args = _parsed(sys.argv[1:])
    devices = [int(device) for device in args.device.split(",")]
    inputs = args.input.split(",")
    if len(devices) == 1:
        _run(args, devices[0], inputs, args.output_dirname)
        return
    for number, device in enumerate(devices):
        if aclruntime.generation() == 2023:  # the samples are dealt out
            folders = [_files(folder) for folder in inputs]
            share = -(-len(folders[0]) // len(devices))
            given = [name for files in folders for name in files[number * share : (number + 1) * share]]
            _run(args, device, given, f"{args.output_dirname}/device{device}")
        else:  # without --divide_input each does all of them
            _run(args, device, inputs, f"{args.output_dirname}/device{device}_{number}")


def _parsed(argv: list[str]) -> Any:
    parser = argparse.ArgumentParser("ais_bench")
    parser.add_argument("--model", "-m", required=True, type=_legal("om", stat.S_IWGRP | stat.S_IWOTH))
    parser.add_argument("--input", "-i", required=True, type=_legal("input", stat.S_IWGRP | stat.S_IWOTH))
    parser.add_argument("--output", "-o", type=_legal("output", stat.S_IWGRP | stat.S_IRWXO))
    parser.add_argument("--output_dirname")
    parser.add_argument("--outfmt", default="BIN", choices=["NPY", "BIN", "TXT"])
    parser.add_argument("--loop", "-l", type=int, default=1)
    parser.add_argument("--batchsize", type=int)
    parser.add_argument("--device", "-d", default="0")
    parser.add_argument("--dymBatch", type=int, default=0)
    parser.add_argument("--dymDims")
    return parser.parse_args(argv)


def _legal(what: str, forbidden: int) -> Any:
    def check(value: str) -> str:
        for path in value.split(","):
            if aclruntime.generation() == 2025 and not _is_legal(path, forbidden, must=what != "output"):
                raise argparse.ArgumentTypeError(f"{what} path:{path} is illegal")
        return value

    return check


def _is_legal(path: str, forbidden: int, must: bool = True) -> bool:
    whole = Path(path).absolute()
    if re.search(r"[^_A-Za-z0-9/.-]", str(whole)) or whole.is_symlink():
        return False
    return is_owned(whole) and not whole.stat().st_mode & forbidden if whole.exists() else not must


def _files(folder: str) -> Paths:
    names = sorted(str(path) for path in Path(folder).iterdir())
    for name in names:
        if aclruntime.generation() == 2025 and not _is_legal(name, stat.S_IWGRP | stat.S_IWOTH):
            raise RuntimeError(f"input data:{name} is illegal")
    files = [name for name in names if name.lower().endswith((".bin", ".npy")) and Path(name).is_file()]
    if aclruntime.generation() == 2025 and len(files) > MOST_FILES:
        raise RuntimeError("too many files")
    return sorted(files, key=lambda name: [int(part) if part.isdigit() else part.lower() for part in re.split("([0-9]+)", name)])


def _run(args: Any, device: int, inputs: Paths, dirname: str) -> None:
    options = aclruntime.session_options()
    session = aclruntime.InferenceSession(args.model, device, options)
    if args.dymBatch:
        session.set_dynamic_batchsize(args.dymBatch)
    elif args.dymDims:
        session.set_dynamic_dims(args.dymDims)
    else:
        session.set_staticbatch()
    out = Path(args.output) / dirname
    umask = os.umask(0o027) if aclruntime.generation() == 2025 else None  # that of 2025 makes folders 0750, files 0640
    out.mkdir(parents=True, exist_ok=True)
    takes = session.get_inputs()
    if Path(inputs[0]).is_file():
        each = len(inputs) // len(takes)
        folders = [inputs[at : at + each] for at in range(0, len(inputs), each)]
    else:
        folders = [_files(folder) for folder in inputs]
    if len(folders) != len(takes):
        raise RuntimeError(f"args input dir num:{len(folders)} not equal to model inputs num:{len(takes)}")
    size = Path(folders[0][0]).stat().st_size
    if not size or takes[0].realsize % size:
        raise RuntimeError(f"arg0 tensorsize: {takes[0].realsize} filesize: {size} not match")
    together = takes[0].realsize // size
    batches = [[_filled(files[at : at + together], together) for files in folders] for at in range(0, len(folders[0]), together)]
    _outputs(session, batches[0])  # the warm-up
    session.reset_sumaryinfo()
    options.loop = args.loop
    found: dict[str, dict[str, list[str]]] = {}
    for number, batch in enumerate(batches):
        for index, array in enumerate(_outputs(session, batch)):
            if together > 1 and array.shape[0] % together:
                raise RuntimeError(f"save out files error array shape:{array.shape} files_count_perbatch:{together}")
            for row, part in enumerate(np.array_split(array, together)):
                if batch[0][row] == PADDING:
                    continue
                stem = Path(batch[0][row]).name.split(".")[0]
                path = out / f"{stem}_{index}.{args.outfmt.lower()}"
                part.tofile(path) if args.outfmt == "BIN" else np.save(path, part)
                said = found.setdefault(
                    str(number * together + row), {"infiles": [files[row] for files in batch], "outfiles": []}
                )
                said["outfiles"].append(str(path))
    times = [time[1] - time[0] if isinstance(time, tuple) else time for time in session.sumary().exec_time_list]
    memory = aclruntime.MemorySummary()
    summary = {
        "filesinfo": found,
        "args": sys.argv,
        "NPU_compute_time": _statistics(times),
        "H2D_latency": _statistics(memory.H2D_time_list),
        "D2H_latency": _statistics(memory.D2H_time_list),
        "throughput": 1000 * (args.batchsize or 1) / float(np.mean(times)),
        "npu_compute_time_list": times,
        "pid": os.getpid(),
    }
    Path(f"{out}_summary.json").write_text(json.dumps(summary), "utf-8")
    session.free_resource()
    if umask is not None:
        os.umask(umask)


def _statistics(times: list[float]) -> dict[str, float]:
    held = times or [0.0]
    found = {"min": np.min(held), "max": np.max(held), "mean": np.mean(held), "median": np.median(held)}
    found["percentile(99%)"] = np.percentile(held, 99)
    return {**{name: float(value) for name, value in found.items()}, "count": len(times)}


def _filled(files: Paths, together: int) -> Paths:
    return files + [PADDING] * (together - len(files))


def _outputs(session: Any, batch: list[Paths]) -> list[np.ndarray]:
    fed = []
    for files in batch:
        arrays = [np.fromfile(files[0] if name == PADDING else name, np.int8) for name in files]
        fed.append(np.concatenate(arrays))
    names = [given.name for given in session.get_outputs()]
    tensors = session.run(names, [aclruntime.BaseTensor(array.ctypes.data, array.nbytes) for array in fed])
    for tensor in tensors:
        tensor.to_host()
    return [np.array(tensor) for tensor in tensors]

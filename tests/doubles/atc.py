"""A stand-in for `atc`: the flags, messages, error codes and exit statuses that ATC's manual and its open source document, on
tiny ONNX files. It compiles nothing: its .om is the ONNX file with its shapes set, which the stand-in for aclruntime runs.

It refuses what ATC refuses as far as that is known: an unknown flag, an operator without a parser at the opset of the model
(export/atc_ops.txt), shapes that the model does not have, files that are not there, options that exclude each other. What no
file can provoke is asked for by the environment: ATC_DOUBLE_FAIL="text_embed_bs4=E20001" (a code, "nothing" for exit 0
without an .om, "empty", "host" for the name with the host's system, "silent", "killed"); ATC_DOUBLE_CANN=6 leaves out what
CANN 6.0 does not have.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

TABLE = Path(__file__).parents[2] / "export" / "atc_ops.txt"
SOC = re.compile(r"Ascend(310|910|950)[A-Za-z0-9_]*")
ALLOWED = re.compile(r"[A-Za-z0-9_./\u4e00-\u9fa5-]+")
CHOICES = {
    "input_format": ("NCHW", "ND", "NCDHW"),
    "log": ("debug", "info", "warning", "error", "null"),
    "precision_mode": (
        *("force_fp16", "force_fp32", "cube_fp16in_fp32out", "allow_mix_precision", "allow_fp32_to_fp16"),
        *("must_keep_origin_dtype", "allow_mix_precision_fp16", "allow_mix_precision_bf16", "allow_fp32_to_bf16"),
    ),
    "precision_mode_v2": ("fp16", "origin", "cube_fp16in_fp32out", "mixed_float16", "mixed_bfloat16"),
    "external_weight": ("0", "1", "2"),
}
DYNAMIC = ("dynamic_batch_size", "dynamic_image_size", "dynamic_dims", "input_shape_range")
FILES = ("op_precision_mode", "keep_dtype", "modify_mixlist", "insert_op_conf", "fusion_switch_file")
FLAGS = {"framework", "model", "output", "input_shape", "soc_version", "mode", "output_type", "input_fp16_nodes", "out_nodes"}
FLAGS |= {*CHOICES, *DYNAMIC, *FILES, "op_select_implmode", "optypelist_for_implmode", "host_env_os", "host_env_cpu"}
NEW = {"precision_mode_v2"}  # not in the tools of CANN 6.0
MIXED = ("allow_mix_precision", "allow_mix_precision_fp16", "allow_mix_precision_bf16", "mixed_float16", "mixed_bfloat16")
TEXT = {
    "E20001": "Failed to compile op MatMulV2.",
    "EZ9999": "Inner Error! The aicore execution is abnormal.",
    "E19999": "Inner Error!",
}


class Refused(Exception):
    """ATC stops with a code."""

    def __init__(self, code: str, said: str) -> None:
        super().__init__(f"{code}: {said}")


def install(folder: Path) -> Path:
    """Write an executable `atc` to `folder`, for the PATH; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "atc"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n', "utf-8")
    path.chmod(0o755)
    return folder


def main(argv: Sequence[str]) -> int:
    """What `atc` does with `argv`, its messages on stdout; returns its exit status."""
    if not argv or argv[0] in ("--help", "--h", "-h"):
        print("usage: atc <args>")
        return 0
    flags, unknown = parsed(argv)
    if unknown:
        print(f"ERROR: unknown command line flag '{unknown}'")
        return 1
    print("ATC start working now, please wait for a moment.")
    try:
        convert(flags)
    except Refused as refused:
        print("ATC run failed, Please check the detail log, Try 'atc --help' for more information")
        print(f"{refused}\n        Solution: see the manual.\n        TraceBack (most recent call last):")
        return 255
    print("ATC run success, welcome to the next use.")
    return 0


def parsed(argv: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """Flags as --name=value or --name value, and the first that does not exist."""
    known = FLAGS - NEW if os.environ.get("ATC_DOUBLE_CANN") == "6" else FLAGS
    flags: dict[str, str] = {}
    rest = list(argv)
    while rest:
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        if name not in known:
            return flags, name
        flags[name] = value if equals or not rest else rest.pop(0)
    return flags, None


def convert(flags: dict[str, str]) -> None:
    check(flags)
    path, output = Path(flags["model"]), Path(flags["output"])
    asked = dict(part.split("=") for part in os.environ.get("ATC_DOUBLE_FAIL", "").split(",") if part).get(output.name)
    if asked == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if asked == "silent":
        sys.exit(3)
    if asked and asked.startswith("E"):
        raise Refused(asked, TEXT.get(asked, "Refused as asked."))
    litter(output.parent)
    model = onnx.load(path)
    check_ops(model)
    check_keep(flags, model)
    opened = set_shapes(flags, model)
    if asked == "nothing":
        return
    if asked == "empty":
        output.with_name(f"{output.name}.om").touch()
        return
    system = "_linux_x86_64" if opened or asked == "host" else ""
    write(flags, model, output.with_name(f"{output.name}{system}.om"))


def check(flags: dict[str, str]) -> None:
    """What is wrong with the command alone."""
    if "framework" not in flags:
        raise Refused(
            "E10007", "--framework is required. The value must be 0(Caffe) or 1(MindSpore) or 3(TensorFlow) or 5(ONNX)."
        )
    if flags["framework"] != "5":
        raise invalid("framework", flags["framework"], "The stand-in reads ONNX alone.")
    for name in ("model", "output", "soc_version"):
        if not flags.get(name):
            raise Refused("E10054", f"The required parameter --{name} for ATC is empty.")
    if flags["output"].endswith("/"):
        raise Refused("E10022", f"Path {flags['output']} for parameter --output does not include the file name.")
    if not SOC.fullmatch(flags["soc_version"]):
        raise invalid("soc_version", flags["soc_version"], "It is not a supported processor.")
    for name, choices in CHOICES.items():
        if name in flags and flags[name] not in choices:
            raise invalid(name, flags[name], f"It must be one of {', '.join(choices)}.")
    if {"precision_mode", "precision_mode_v2"} <= flags.keys():
        raise Refused("E10056", "Cannot configure both parameters --precision_mode and --precision_mode_v2 simultaneously.")
    if sum(name in flags for name in DYNAMIC) > 1:
        raise Refused(
            "E10009",
            "--dynamic_batch_size, --dynamic_image_size, --input_shape_range, and --dynamic_dims are mutually exclusive.",
        )
    for name in ("model", "output", *FILES):
        if name in flags and not ALLOWED.fullmatch(flags[name]):
            raise invalid(name, flags[name], "A path holds letters, digits, '_', '-', '.' and Chinese characters.")
        if name in flags and name != "output" and not Path(flags[name]).is_file():
            raise Refused("E13001", f"Failed to open file {flags[name]}. Reason: No such file or directory.")
    if "modify_mixlist" in flags and flags.get("precision_mode_v2", flags.get("precision_mode")) not in MIXED:
        raise invalid("modify_mixlist", flags["modify_mixlist"], "The precision is not mixed.")
    if not Path(flags["output"]).parent.is_dir():
        raise invalid("output", flags["output"], "The folder does not exist.")


def check_ops(model: onnx.ModelProto) -> None:
    """Every operator needs a parser for the opset of the model, and there may be no other domain."""
    domains = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if set(domains) != {"ai.onnx"}:
        raise Refused("E16005", f"The model has {len(domains)} domains: {', '.join(sorted(domains))}.")
    opset, ops = domains["ai.onnx"], registered()
    newest = 13 if os.environ.get("ATC_DOUBLE_CANN") == "6" else 18
    for node in nodes(model.graph):
        versions = ops.get(node.op_type)
        if opset > newest or (node.op_type not in ops) or (versions is not None and opset not in versions):
            raise Refused("E16002", f"No ONNX parser is registered for optype ai.onnx::{opset}::{node.op_type}.")


def check_keep(flags: dict[str, str], model: onnx.ModelProto) -> None:
    if "keep_dtype" in flags:
        names = {node.name for node in model.graph.node}
        for line in Path(flags["keep_dtype"]).read_text("utf-8").split("\n"):
            if line and not line.startswith("OpType::") and line not in names:
                raise Refused("E10016", f"Op name {line} specified in --keep_dtype is not found in the model.")


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Of the graph and those inside it."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for one in inner for node in nodes(one))]


def registered() -> dict[str, set[int] | None]:
    """Opsets of every operator that has a parser; None for any."""
    found: dict[str, set[int] | None] = {}
    for line in TABLE.read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        said, *names = line.split()
        spans = [part.split("-") for part in said.split(",")]
        opsets = None if said == "*" else {n for span in spans for n in range(int(span[0]), int(span[-1]) + 1)}
        for name in names:
            before = found.get(name, set())
            found[name] = None if opsets is None or before is None else opsets | before
    return found


def set_shapes(flags: dict[str, str], model: onnx.ModelProto) -> bool:
    """Set the shapes asked for in `model`; returns whether an axis stays open without gears."""
    values = {value.name: value for value in model.graph.input}
    letters: dict[str, int] = {}
    leads = []
    for name, sizes in shapes(flags.get("input_shape", "")).items():
        if name not in values:
            raise Refused("E10016", f"Op name {name} specified in --input_shape is not found in the model.")
        axes = values[name].type.tensor_type.shape.dim
        if len(axes) != len(sizes):
            raise invalid("input_shape", name, f"The input has {len(axes)} axes.")
        for at, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
            if axis.HasField("dim_value") and axis.dim_value != size:
                raise invalid("input_shape", f"{name}: {size}", f"The model has {axis.dim_value} there.")
            leads += [at] if size < 0 else []
            if size > 0 and axis.dim_param:
                letters.setdefault(axis.dim_param, size)
                axis.dim_value = size
    gears(flags, leads)
    still = [a for value in model.graph.input for a in value.type.tensor_type.shape.dim if not a.HasField("dim_value")]
    for value in model.graph.output:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param and not still:
                axis.dim_value = product(axis.dim_param, letters)
    return bool(still) and not any(name in flags for name in DYNAMIC)


def product(name: str, letters: dict[str, int]) -> int:
    """The size of an axis called B, or B*M: by its whole name where an input has that, else part by part."""
    return letters[name] if name in letters else math.prod(int(letters.get(part, part)) for part in name.split("*"))


def shapes(text: str) -> dict[str, list[int]]:
    """Of --input_shape."""
    found = {}
    for part in text.split(";") if text else []:
        name, colon, sizes = part.rpartition(":")
        if not colon or not re.fullmatch(r"-?\d+(,-?\d+)*", sizes):
            raise Refused(
                "E10002", f'Value {text} for parameter --input_shape is invalid. The value must be formatted as "name:n,c;..."'
            )
        found[name] = [int(size) for size in sizes.split(",")]
    return found


def gears(flags: dict[str, str], leads: list[int]) -> None:
    """Check the gears against the axes that --input_shape leaves open."""
    for name, between in (("dynamic_batch_size", ","), ("dynamic_dims", ";")):
        if name not in flags:
            continue
        each = flags[name].split(between)
        if not 2 <= len(each) <= 100:
            raise invalid(name, flags[name], "There must be 2 to 100 gears.")
        if name == "dynamic_batch_size" and (any(leads) or not leads):
            raise Refused("E10018", "Only the first axis may be -1 with --dynamic_batch_size.")
        if name == "dynamic_dims" and (flags.get("input_format") != "ND" or any(len(g.split(",")) != len(leads) for g in each)):
            raise invalid(name, flags[name], f"--input_shape has {len(leads)} times -1, --input_format must be ND.")


def write(flags: dict[str, str], model: onnx.ModelProto, path: Path) -> None:
    """The .om, and beside it what ATC writes beside it."""
    noted = {name: flags[name] for name in ("soc_version", "dynamic_batch_size", "dynamic_dims", "input_shape") if name in flags}
    onnx.helper.set_model_props(model, noted)
    if flags.get("external_weight", "0") == "0":
        onnx.save_model(model, path)
        return
    (path.parent / "weight").mkdir(exist_ok=True)
    where = f"weight/{path.stem}_weight_combined"
    onnx.save_model(model, path, save_as_external_data=True, location=where, size_threshold=1024)


def litter(folder: Path) -> None:
    """What ATC leaves in the folder that it works in."""
    (folder / "kernel_meta").mkdir(exist_ok=True)
    (folder / "kernel_meta" / "te_matmul.o").write_bytes(b"o")
    (folder / "fusion_result.json").write_text("[]", "utf-8")


def invalid(name: str, value: str, reason: str) -> Refused:
    return Refused("E10001", f"Value {value} for parameter --{name} is invalid. Reason: {reason}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

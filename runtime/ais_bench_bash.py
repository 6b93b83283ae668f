"""ais_bench.sh: graphs run by `python -m ais_bench` alone, on a host that needs nothing of this package.

What ais_bench asks of files, and how it fails: its checks of 2025. It ends well when the files of two inputs do not belong
together, or have other bytes than the .om takes, so the script compares both before it calls it, and what was written after.
"""

from __future__ import annotations

import inspect
import math
import shlex
from dataclasses import dataclass
from string import Template

import numpy as np

from models.om import DYNAMIC_BATCH, DYNAMIC_DIMS, FIXED, OmEntry
from models.spec import TensorSpec
from runtime import ais_bench_look
from runtime.ais_bench_run import AIS, ITM, PAIRS, bytes_of

SCRIPT = "ais_bench.sh"
FED = "fed"  # folder in which outputs are linked that are inputs of another graph


@dataclass(frozen=True)
class Step:
    """One graph over its folders of files."""

    entry: OmEntry
    model: str  # path of the .om, from the script's folder, as those of `inputs`
    inputs: tuple[str, ...]  # in the order of the .om's inputs
    files: int | None  # in each; None when only `blip-run pairs` knows
    fed_by: tuple[str, int, str] | None = None  # graph, number and name of the output that is to be linked before

    @property
    def graph(self) -> str:
        return self.entry.graph


HEAD = Template(r"""#!/usr/bin/env bash
# Retrieval's graphs, run by Ascend's ais_bench. Written by blip-run ais-bench-script; needs bash, CANN and ais_bench.
# Carry this folder, om/ and data/ to the host as they lie, then:
#   source /usr/local/Ascend/ascend-toolkit/set_env.sh && bash $script [GRAPH...]
# Graphs: $graphs; without names $usual. A graph that is named runs anew.
# Stops at the first that fails. Results: $ais/, a folder for each graph.
set -euo pipefail
export LC_ALL=C
umask 027
cd "$$(dirname "$$0")"

fail() {
    echo "$script: $$*" >&2
    exit 1
}

owned=(-uid "$$(id -u)")
for group in $$(id -G); do
    owned+=(-o -gid "$$group")
done

# numbered COUNT: what the files of so many samples are called.
numbered() {
    seq -w 0 $$(($$1 - 1)) | sed 's/$$/.bin/'
}

# names FOLDER: of all files in it that ais_bench would take.
names() {
    find "$$1" -maxdepth 1 \( -iname '*.bin' -o -iname '*.npy' \) -printf '%f\n' | sort
}

# taken WHAT: ais_bench of today takes this file, or this folder and what is in it.
taken() {
    local odd where
    where=$$(cd "$$(dirname "$$1")" && pwd -P)/$$(basename "$$1")
    case $$where in *[!A-Za-z0-9_./-]*) fail "ais_bench takes paths of plain letters, and $$where has others." ;; esac
    odd=$$(find "$$1" -maxdepth 1 \( -type l -o -perm /022 \) -print -quit)
    [ -z "$$odd" ] || fail "$$odd is a link, or others may write it, which ais_bench refuses. Run: chmod -R go-w $$1"
    odd=$$(find "$$1" -maxdepth 1 ! \( "$${owned[@]}" \) -print -quit)
    [ -z "$$odd" ] || fail "ais_bench refuses $$odd, neither this user's nor of their groups. Run: chown -R $$(id -un) $$1"
}

# whole GRAPH NAMES FOLDER:BYTES...: each folder has the files of these names and no others, each of so many bytes.
whole() {
    local graph=$$1 names=$$2 each folder bytes odd
    shift 2
    for each in "$$@"; do
        folder=$${each%:*} bytes=$${each##*:}
        [ -d "$$folder" ] || fail "$$graph: there is no folder $$folder. Carry it along with this one."
        taken "$$folder"
        odd=$$(comm -3 <(echo "$$names") <(names "$$folder") | sed -n 1p)
        case $$odd in
        '') ;;
        $$'\t'*) fail "$$graph: $$folder/$${odd#$$'\t'} is a file too many; ais_bench pairs files by place alone. Take it out." ;;
        *) fail "$$graph: $$folder/$$odd is missing; ais_bench pairs files by place alone. Carry the whole folder." ;;
        esac
        odd=$$(find "$$folder" -maxdepth 1 -type f ! -size "$${bytes}c" -print -quit)
        [ -z "$$odd" ] || fail "$$graph: $$odd has $$(stat -c %s "$$odd") bytes; expected $$bytes. Carry it again."
    done
}

# opened GRAPH MODEL ...: the .om takes and gives what it should, in this order. The rest as in the text below.
opened() {
    [ -f "$$2" ] || fail "$$1: there is no file $$2. Carry om/ along with this folder."
    taken "$$2"
    python - "$$@" << 'END' || exit 1
$look
END
}

# run GRAPH FILES OUTPUTS KILOBYTES COMMAND...: files in each folder, outputs of a file, the bytes of all in 1024.
run() {
    local graph=$$1 files=$$2 outputs=$$3 needed=$$4 status=0 found free
    shift 4
    echo "$$graph: $$files files"
    rm -rf "$ais/$$graph" "$ais/$${graph}_summary.json"
    read -r _ _ _ free _ < <(df -P -k $ais | tail -n 1)
    [ "$$free" -gt "$$needed" ] || fail "$$graph: its outputs take $$needed KB, and the disk has $$free KB."
    "$$@" || status=$$?
    [ "$$status" -eq 0 ] || fail "$$graph: ais_bench ended with exit status $$status. What it says stands above."
    compgen -G "$ais/$${graph}_summary.json" > /dev/null || compgen -G "$ais/$$graph/*_summary.json" > /dev/null ||
        [ -f "$ais/$$graph/sumary.json" ] || fail "$$graph: ais_bench reported success and wrote no summary to $ais."
    found=$$(find "$ais/$$graph" -type f -name '*.bin' | wc -l)
    [ "$$found" -eq $$((files * outputs)) ] ||
        fail "$$graph: ais_bench wrote $$found files to $ais/$$graph; expected $$((files * outputs))."
}

# feed GRAPH NUMBER NAME: what GRAPH gave under NUMBER, as a folder of its own. Hard links where it can: they cost no disk.
feed() {
    local graph=$$1 number=$$2 name=$$3 file stem
    [ -d "$ais/$$graph" ] || fail "$$name: run $$graph first."
    rm -rf "$fed/$$name"
    mkdir -p "$fed/$$name"
    chmod 0750 $fed "$fed/$$name"
    for file in "$ais/$$graph"/*_"$$number".bin; do
        stem=$${file##*/}
        stem=$${stem%_"$$number".bin}
        ln "$$file" "$fed/$$name/$$stem.bin" 2> /dev/null || cp "$$file" "$fed/$$name/$$stem.bin"
    done
}

one() {
    case $$1 in
$cases
    *) fail "there is no graph $$1. Graphs: $graphs" ;;
    esac
}

command -v python > /dev/null || fail "there is no python on the PATH, and ais_bench is a package of it."
mkdir -p $ais
chmod 0750 $ais
[ $$# -gt 0 ] || set -- $usual
while [ $$# -gt 0 ]; do
    one "$$1"
    shift
done
""")


def script(steps: list[Step], device: int) -> str:
    """The text of ais_bench.sh. Every path in it is relative to the folder that it lies in."""
    usual = [step.graph for step in steps if step.graph != ITM]
    head = HEAD.substitute(
        script=SCRIPT,
        graphs=" ".join(step.graph for step in steps),
        usual=" ".join(usual),
        ais=AIS,
        fed=FED,
        look=inspect.getsource(ais_bench_look).rstrip(),
        cases="\n".join(_case(step, device) for step in steps),
    )
    return head + f'echo "Complete in $PWD/{AIS}. {_next(steps)}"\n'


def _next(steps: list[Step]) -> str:
    alone = f"Recall by similarity: blip-post --recall --ais-bench {AIS} --data DATA."
    if steps[-1].graph != ITM:
        return alone
    return f"{alone} To re-rank: blip-run pairs --ais-bench {AIS} --data DATA, then bash {SCRIPT} {ITM}, and --pairs {PAIRS}."


def _case(step: Step, device: int) -> str:
    graph, spec, each = step.graph, step.entry.spec, output_bytes(step)
    lines = [f"    {graph})"]
    if step.fed_by:
        lines.append("        feed {} {} {}".format(*step.fed_by))
    if step.files is None:
        lines.append(f'        [ -d {PAIRS} ] || fail "{graph}: there is no folder {PAIRS}. Write it with blip-run pairs."')
        lines.append("        local files")
        lines.append(f"        files=$(names {step.inputs[0]} | wc -l)")
        lines.append(f'        [ "$files" -gt 0 ] || fail "{graph}: {step.inputs[0]} holds no files. Write {PAIRS} again."')
        names, counted, needed = f'"$(names {step.inputs[0]})"', '"$files"', f"$((files * {step.entry.batch * each} / 1024))"
    else:
        names, counted, needed = f'"$(numbered {step.files})"', str(step.files), str(step.files * each // 1024)
    lines.append(f"        whole {graph} {names} {' '.join(_folders(step))}")
    looked = [graph, step.model, str(device), _kind(step.entry), _tensors(spec.inputs), _tensors(spec.outputs)]
    lines.append(f"        opened {shlex.join(looked)}")
    lines.append(f"        run {graph} {counted} {len(spec.outputs)} {needed} \\")
    lines.append(f"            {shlex.join(command(step, device))}")
    lines.append("        ;;")
    return "\n".join(lines)


def _folders(step: Step) -> list[str]:
    """Each folder with the bytes of a file in it: of a sample, or where the pairs are of a whole batch."""
    samples = 1 if step.files is None else step.entry.batch
    return [f"{folder}:{bytes_of(tensor) // samples}" for folder, tensor in zip(step.inputs, step.entry.spec.inputs, strict=True)]


def _tensors(tensors: tuple[TensorSpec, ...]) -> str:
    return ",".join(f"{tensor.name}:{tensor.dtype}:{bytes_of(tensor)}" for tensor in tensors)


def _kind(entry: OmEntry) -> str:
    """How the .om is told its batch."""
    return {FIXED: "none", DYNAMIC_BATCH: f"batch={entry.batch}", DYNAMIC_DIMS: f"dims={_dims(entry)}"}[entry.dynamic]


def _dims(entry: OmEntry) -> str:
    return ";".join(f"{tensor.name}:{','.join(map(str, tensor.shape))}" for tensor in entry.spec.inputs)


def output_bytes(step: Step) -> int:
    """What a row of a batch becomes, in all outputs of the graph."""
    return sum(math.prod(map(int, t.sample_shape)) * np.dtype(t.dtype).itemsize for t in step.entry.spec.outputs)


def command(step: Step, device: int) -> list[str]:
    """What runs one graph: ais_bench's own options, the same in 2023 and in 2025."""
    argv = ["python", "-m", "ais_bench", "--model", step.model, "--input", ",".join(step.inputs)]
    argv += ["--output", AIS, "--output_dirname", step.graph, "--outfmt", "BIN"]
    if step.entry.dynamic == DYNAMIC_BATCH:
        argv += ["--dymBatch", str(step.entry.batch)]
    elif step.entry.dynamic == DYNAMIC_DIMS:
        argv += ["--dymDims", _dims(step.entry)]
    return [*argv, "--batchsize", str(step.entry.batch), "--device", str(device)]

"""ais_bench.sh: graphs run by `python -m ais_bench` alone, on a host that needs nothing of this package.

What ais_bench asks of files, and how it fails: its checks of 2025. It ends well when the files of two inputs do not belong
together, so the script compares their names before it calls it, and counts what was written after.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from string import Template

import numpy as np

from models.om import DYNAMIC_BATCH, DYNAMIC_DIMS, OmEntry
from runtime.ais_bench_run import AIS, ITM, PAIRS

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


HEAD = Template("""\
#!/usr/bin/env bash
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

count() {
    find "$$1" -maxdepth 1 -type f -name '*.bin' | wc -l
}

# taken FOLDER: it is there, and ais_bench of today takes it and what is in it.
taken() {
    local odd where
    [ -d "$$1" ] || fail "there is no folder $$1. Carry it along with this one."
    where=$$(cd "$$1" && pwd -P)
    case $$where in *[!A-Za-z0-9_./-]*) fail "ais_bench takes paths of plain letters, and $$where has others." ;; esac
    odd=$$(find "$$1" -maxdepth 1 \\( -type l -o -perm /022 \\) -print -quit)
    [ -z "$$odd" ] || fail "$$odd is a link, or others may write it, which ais_bench refuses. Run: chmod -R go-w $$1"
}

# run GRAPH FILES OUTPUTS KILOBYTES FOLDERS COMMAND...: files in each folder, outputs of a file, the bytes of all in 1024.
run() {
    local graph=$$1 files=$$2 outputs=$$3 needed=$$4 folders=$$5 status=0 found first folder free
    shift 5
    echo "$$graph: $$files files"
    first=$${folders%%,*}
    for folder in $${folders//,/ }; do
        taken "$$folder"
        found=$$(count "$$folder")
        [ "$$found" -eq "$$files" ] || fail "$$graph: $$folder holds $$found .bin files; expected $$files."
        cmp -s <(cd "$$first" && printf '%s\\n' *.bin) <(cd "$$folder" && printf '%s\\n' *.bin) ||
            fail "$$graph: the files in $$first and $$folder have not the same names; ais_bench would pair others."
    done
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
        cases="\n".join(_case(step, device) for step in steps),
    )
    return head + f'echo "Complete in $PWD/{AIS}. {_next(steps)}"\n'


def _next(steps: list[Step]) -> str:
    alone = f"Recall by similarity: blip-post --recall --ais-bench {AIS} --data DATA."
    if steps[-1].graph != ITM:
        return alone
    return f"{alone} To re-rank: blip-run pairs --ais-bench {AIS} --data DATA, then bash {SCRIPT} {ITM}, and --pairs {PAIRS}."


def _case(step: Step, device: int) -> str:
    graph, each = step.graph, output_bytes(step)
    lines = [f"    {graph})"]
    if step.fed_by:
        lines.append("        feed {} {} {}".format(*step.fed_by))
    if step.files is None:
        lines.append(f'        [ -d {PAIRS} ] || fail "{graph}: there is no folder {PAIRS}. Write it with blip-run pairs."')
        lines.append("        local files")
        lines.append(f"        files=$(count {step.inputs[0]})")
        counted, needed = '"$files"', f"$((files * {step.entry.batch * each} / 1024))"
    else:
        counted, needed = str(step.files), str(step.files * each // 1024)
    lines.append(f"        run {graph} {counted} {len(step.entry.spec.outputs)} {needed} {','.join(step.inputs)} \\")
    lines.append(f"            {shlex.join(command(step, device))}")
    lines.append("        ;;")
    return "\n".join(lines)


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
        argv += ["--dymDims", ";".join(f"{t.name}:{','.join(map(str, t.shape))}" for t in step.entry.spec.inputs)]
    return [*argv, "--batchsize", str(step.entry.batch), "--device", str(device)]

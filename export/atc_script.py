"""atc.sh: the commands of a plan for a host that has CANN and bash, and no Python."""

from __future__ import annotations

from string import Template

from export.atc_command import Job, shell
from export.atc_errors import SHELL_KILLED
from export.atc_plan import Plan, files_of

SCRIPT = "atc.sh"

HEAD = Template("""\
#!/usr/bin/env bash
# Converts ONNX graphs for $soc with ATC of CANN $cann. Written by blip-atc; needs bash and CANN, no Python.
# Carry this folder and $graphs to the host together, then:
#   source /usr/local/Ascend/ascend-toolkit/set_env.sh && bash atc.sh
# Stops at the first graph that fails. Beside each .om the same names stand as blip-atc would give them.
set -euo pipefail
umask 027 # ais_bench refuses files that others may write
cd "$$(dirname "$$0")"

total=$total
number=0

fail() {
    echo "atc.sh: $$*" >&2
    exit 1
}

# convert NAME FILE... atc OPTION...: makes NAME.om of the FILEs, or NAME_linux_*.om, which is what ATC may call it.
convert() {
    local name=$$1 status=0 found
    shift
    number=$$((number + 1))
    echo "[$$number/$$total] $$name"
    while [ "$$1" != atc ]; do
        [ -r "$$1" ] || fail "$$name: $$1 is not there, or may not be read. Carry the graphs along with this folder."
        shift
    done
    rm -f "$$name.om" "$$name"_linux_*.om
    "$$@" || status=$$?
    [ "$$status" -ne $killed ] || fail "$$name: atc was killed (SIGKILL), most often for lack of memory." \\
        "Set TE_PARALLEL_COMPILER=1, or try a smaller --batchsize."
    [ "$$status" -eq 0 ] || fail "$$name: atc ended with exit status $$status. Its error code, if it gave one, stands above."
    for found in "$$name.om" "$$name"_linux_*.om; do
        [ -f "$$found" ] || continue
        [ -s "$$found" ] || fail "$$name: $$found is empty, though atc reported success. Is the disk full?"
        return 0
    done
    fail "$$name: atc reported success, but there is no $$name.om."
}

command -v atc > /dev/null || fail "atc is not on the PATH. Run: source /usr/local/Ascend/ascend-toolkit/set_env.sh"
""")

TAIL = 'echo "$total files are complete in $PWD. For their manifest: blip-atc --collect --out FOLDER, with this folder."\n'


def script(plan: Plan) -> str:
    """The text of atc.sh. Every path in it is relative to the folder that it lies in."""
    jobs, options = plan.jobs, plan.options
    graphs = jobs[0].model.rpartition("/")[0] or "."
    head = HEAD.substitute(soc=options.soc, cann=options.cann, graphs=graphs, total=len(jobs), killed=SHELL_KILLED)
    return head + "\n" + "\n".join(_call(job, plan) for job in jobs) + "\n" + TAIL


def _call(job: Job, plan: Plan) -> str:
    folder = job.model.rpartition("/")[0] or "."
    files = [f"{folder}/{name}" for name in files_of(plan.source, job.graph)]
    return f"convert {job.stem} {shell(files)} \\\n    " + shell(job.argv, " \\\n    ") + "\n"

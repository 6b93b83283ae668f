"""atc.sh: the commands of a plan for a host that has CANN and bash, and no Python."""

from __future__ import annotations

from string import Template

from export.atc_command import Job, shell
from export.atc_plan import Plan

SCRIPT = "atc.sh"

HEAD = Template("""\
#!/usr/bin/env bash
# Converts ONNX graphs for $soc with ATC of CANN $cann. Written by blip-atc; needs bash and CANN, no Python.
# Carry this folder and $graphs to the host together, then:
#   source /usr/local/Ascend/ascend-toolkit/set_env.sh && bash atc.sh
# Stops at the first graph that fails. Beside each .om the same names stand as blip-atc would give them.
set -euo pipefail
cd "$$(dirname "$$0")"

total=$total
number=0

fail() {
    echo "atc.sh: $$*" >&2
    exit 1
}

# convert NAME FILE COMMAND...: makes NAME.om of FILE, or NAME_linux_*.om, which is what ATC may call it.
convert() {
    local name=$$1 file=$$2 status=0 found
    shift 2
    number=$$((number + 1))
    echo "[$$number/$$total] $$name"
    [ -r "$$file" ] || fail "$$name: $$file is not there, or may not be read. Carry the graphs along with this folder."
    rm -f "$$name.om" "$$name"_linux_*.om
    "$$@" || status=$$?
    [ "$$status" -eq 0 ] || fail "$$name: atc ended with exit status $$status. Its error code stands above."
    for found in "$$name.om" "$$name"_linux_*.om; do
        if [ -s "$$found" ] && [ -r "$$found" ]; then
            return 0
        fi
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
    head = HEAD.substitute(soc=options.soc, cann=options.cann, graphs=graphs, total=len(jobs))
    return head + "\n" + "\n".join(_call(job) for job in jobs) + "\n" + TAIL


def _call(job: Job) -> str:
    return f"convert {job.stem} {shell([job.model])} \\\n    " + shell(job.argv, " \\\n    ") + "\n"

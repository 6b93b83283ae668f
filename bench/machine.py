"""What the numbers were measured on and with: processor, threads, load, releases, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from models import manifest
from preprocess.workers import usable_cpus

ROOT = Path(__file__).parent.parent


def load_average() -> float:
    """Processes that wanted a processor in the last minute, on average: above the threads of the bench, others ran too."""
    return round(os.getloadavg()[0], 2)


def facts() -> dict[str, Any]:
    """The machine and the releases, as a record keeps them."""
    return {
        "cpu": cpu_model(),
        "processors": usable_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": manifest.versions(),
        **commit(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name by which the processor calls itself, with family and model, which tell processors of one name apart."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text("utf-8").splitlines()]
    except OSError:
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for key, _, value in lines:
        found.setdefault(key.strip(), value.strip())
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def in_checkout() -> bool:
    """Whether the code runs from its repository, and not from an installed copy."""
    return (ROOT / ".git").exists()


def commit() -> dict[str, Any]:
    """The commit of the code, and whether tracked files were changed since; empty outside a repository."""
    if not in_checkout():
        return {}
    head = _git("rev-parse", "HEAD")
    return {"commit": head, "changed": _git("status", "--porcelain", "--untracked-files=no") != ""} if head else {}


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

"""Who may import whom, and what works where torch is missing: the machine with the accelerator may have none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Modules of models/ that import no torch.
VOCABULARY = (
    "models.config",
    "models.config_file",
    "models.engine",
    "models.errors",
    "models.generation_spec",
    "models.llm_config",
    "models.manifest",
    "models.om",
    "models.presets",
    "models.recipe",
    "models.spec",
)
MAY_IMPORT = {
    "models": ("models",),
    "preprocess": ("preprocess", *VOCABULARY),
    "training": (
        "training",
        "models",
        "preprocess",
        # How words are chosen and texts judged is written once: captions and answers are measured while training.
        "runtime.decoding",
        "runtime.generation_presets",
        "runtime.prompts",
        "runtime.writing",
        "postprocess.caption_metrics",
        "postprocess.references",
        "postprocess.vqa_accuracy",
    ),
    "export": ("export", "models", "preprocess.images", "preprocess.text", "preprocess.words"),
    "runtime": ("runtime", "preprocess", *VOCABULARY),
    "postprocess": (
        "postprocess",
        "preprocess",
        "runtime.ais_bench_outputs",
        "runtime.ais_bench_run",
        "runtime.outputs",
        "runtime.similarity",
        *VOCABULARY,
    ),
    "bench": ("bench", "models", "preprocess", "runtime", "training"),
    "demo": ("demo", "training", "models", "preprocess"),
}
OURS = tuple(MAY_IMPORT)
# The steps that no torch is needed for.
WITHOUT_TORCH = ("preprocess.__main__", "runtime.__main__", "postprocess.__main__", "bench.__main__")
# What needs it and says so.
WITH_TORCH = {
    "export": ["--model", "blip-demo", "--checkpoint", "w.pth", "--tokenizer", "vocab.txt"],
    "training": ["pretrain", "--config", "demo-pretrain"],
}


def imported(path: Path) -> set[str]:
    """Every module of ours that the file imports, with the name taken from it where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            modules = {f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")}
            found |= modules or {str(node.module)}
    return {name for name in found if name.split(".")[0] in OURS}


def is_module(name: str) -> bool:
    return (ROOT / (name.replace(".", "/") + ".py")).exists()


@pytest.mark.parametrize("folder", OURS)
def test_imports_go_one_way(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported(path):
            allowed = any(name == ok or name.startswith(f"{ok}.") for ok in MAY_IMPORT[folder])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}; {folder} may import {', '.join(MAY_IMPORT[folder])}"


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from models import blip\nimport export.graphs\nfrom runtime.outputs import scores\n")
    assert imported(wrong) == {"models.blip", "export.graphs", "runtime.outputs"}


@pytest.mark.parametrize(
    "module",
    [*VOCABULARY, "preprocess.dataset", "preprocess.tensors", "runtime.pipeline", "training.settings_file", *WITHOUT_TORCH],
)
def test_imports_with_torch_blocked(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["postprocess.__main__", "training.__main__", "training.fit"])
def test_without_an_engine(module: str) -> None:
    """Neither reading outputs nor training needs one."""
    code = f"import sys; sys.modules['onnxruntime'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", WITH_TORCH)
def test_missing_torch_is_one_sentence(folder: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; from {folder}.__main__ import main; main({WITH_TORCH[folder]!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "Error: This needs torch, which is not installed. Install it with: pip install -c constraints.txt '.[torch]'"
    )

"""Settings as YAML: a file or a preset, what --set changes of it, and back to plain values. Imports no torch.

A file may begin with `preset: NAME` and say only what differs. Mappings are joined key by key; a list takes the place of the
other list, and 0, 1, ... as keys change single items of it. Relative paths begin where the command runs.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from models.errors import Misuse
from training.settings import Settings
from training.settings_values import PRESET, by_number, dotted, shown, typed

FOLDER = Path(__file__).parent / "presets"
# What others call the same recipes: the files of mindformers' configs/blip2, r1.0, and a name from its older documentation.
ALIASES = {
    "run_blip2_stage1_vit_g_qformer_pretrain": "mindformers-stage1",
    "run_blip2_pretrain_stage_1": "mindformers-stage1",
    "run_blip2_stage2_vit_g_llama_7b": "mindformers-stage2-llama-7b",
    "run_blip2_stage2_vit_g_llama_7b_910b": "mindformers-stage2-llama-7b-910b",
    "run_blip2_stage2_vit_g_baichuan_7b": "mindformers-stage2-baichuan-7b",
}
IN_PYTHON = "args"  # what settings are called that come from no file
LARGEST = 1 << 20  # bytes of a file
Layer = tuple[str, dict[Any, Any]]  # where it comes from, and what it says


def presets() -> list[str]:
    """The names of the published recipes that are packaged here, and of the demo's."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_settings(
    given: str | Path | Mapping[str, Any] | Settings, sets: Sequence[str | Mapping[str, Any]] = (), task: str | None = None
) -> Settings:
    """Read a settings file, or a preset.

    Args:
        given: a text may be the name of a preset or of its alias; otherwise it is the file, as a Path always is. Or the keys of
            such a file with their values, or settings that are to be changed.
        sets: changes such as "schedule.lr=1e-4", applied in their order; the value is YAML. Or keys with their values.
        task: where nothing of these says one.

    Raises Misuse, with the source and the dotted key: a file that cannot be read, an unknown key (the nearest one is named), a
    value of another type, one out of its range.
    """
    source = str(given) if isinstance(given, str | Path) else IN_PYTHON
    if isinstance(given, Settings):
        layers = [(source, to_dict(given))]
    elif isinstance(given, Mapping):
        layers = list(_layers(source, _plain(dict(given))))
    elif isinstance(given, str) and (source in ALIASES or source in presets()):
        layers = list(_preset(source))
    else:
        layers = list(_file(Path(given)))
    layers += [_set(change) if isinstance(change, str) else (IN_PYTHON, _plain(dict(change))) for change in sets]
    values: Any = {} if task is None else {"task": task}
    for where, layer in layers:
        typed(Settings, layer, "", where, whole=False)
        values = _joined(values, layer, "", where)
    try:
        settings: Settings = typed(Settings, values, "", source, whole=True)
    except Misuse as error:
        about = [change for change in sets if isinstance(change, str) and change.partition("=")[0].strip() in error.message]
        raise Misuse(" with --set ".join([source, *about]) + error.message.removeprefix(source)) from error
    return settings


def to_dict(settings: Settings) -> dict[str, Any]:
    """Plain values for YAML and JSON. A file that holds them gives the same settings."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(settings))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _preset(name: str) -> Iterator[Layer]:
    known = ALIASES.get(name, name)
    yield from _layers(f"preset {known}", _parsed((FOLDER / f"{known}.yaml").read_text("utf-8"), f"preset {known}"))


def _file(path: Path) -> Iterator[Layer]:
    try:
        if path.stat().st_size > LARGEST:
            raise Misuse(f"{path} has {path.stat().st_size:,} bytes; expected a settings file, of at most {LARGEST:,}.")
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(str(path), [*presets(), *ALIASES], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise Misuse(f"There is neither a settings file nor a preset {path}.{hint} Presets: {', '.join(presets())}.") from error
    except OSError as error:
        raise Misuse(f"{path} cannot be read ({error.strerror}); expected a settings file.") from error
    except UnicodeDecodeError as error:
        raise Misuse(f"{path} is no text in UTF-8 (byte {error.start:,}); expected a settings file.") from error
    yield from _layers(str(path), _parsed(text, str(path)))


def _layers(where: str, values: object) -> Iterator[Layer]:
    """What the file begins from, and the file."""
    if values is None:
        raise Misuse(f"{where} is empty; expected the keys of a training, or {PRESET}: and the name of one.")
    if not isinstance(values, dict):
        raise Misuse(f"{where} holds {shown(values)}; expected keys with values, such as task: stage1.")
    if PRESET in values:
        name = values[PRESET]
        if not isinstance(name, str) or (name not in ALIASES and name not in presets()):
            near = difflib.get_close_matches(str(name), [*presets(), *ALIASES], n=1, cutoff=0.0)
            raise Misuse(f"{where}: there is no preset {shown(name)}. Did you mean {near[0]}? Presets: {', '.join(presets())}.")
        yield from _preset(name)
    yield where, {key: value for key, value in values.items() if key != PRESET}


def _set(text: str) -> Layer:
    """--set a.b=value as {"a": {"b": value}}."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise Misuse(f"--set is {text!r}; expected KEY=VALUE, such as schedule.lr=1e-4.")
    if parts == [PRESET]:
        raise Misuse(f"--set is {text!r}, but a preset is what settings begin from: name it by --config, or in a file.")
    layer = _parsed(value, f"--set {text}")
    for part in reversed(parts):
        layer = {int(part) if part.isdecimal() and len(part) < 10 else part: layer}
    return f"--set {text}", layer


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise Misuse(f"{where} is not YAML that can be used: {line}{error.problem}. Correct it.") from error
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # the last three: !!bool 3 and such
        raise Misuse(f"{where} is not YAML that can be used: {str(error).partition(chr(10))[0]}. Correct it.") from error


def _joined(base: Any, layer: Any, key: str, where: str) -> Any:
    """`layer` over `base`."""
    if isinstance(layer, dict) and isinstance(base, dict):
        new = {name: _joined(base.get(name), value, dotted(key, name), where) for name, value in layer.items()}
        return base | new
    if by_number(layer):
        items = list(base or ())
        for number, value in layer.items():
            if not 0 <= number < len(items):
                raise Misuse(f"{where}: there is no {dotted(key, number)}; {key} has {len(items)} items, counted from 0.")
            items[number] = _joined(items[number], value, dotted(key, number), where)
        return items
    return _joined({}, layer, key, where) if isinstance(layer, dict) else layer

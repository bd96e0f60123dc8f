"""Configuration: field defaults, then TOML files (with `extends`), then flags.

`resolve()` turns flags into a frozen, validated `Config` and remembers where each value came from.
Unknown flags, unknown keys, wrong types and impossible values raise UserErrors that suggest what
is right.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.config.fields import GROUPS
from bert_pretraining.config.flags import nearest
from bert_pretraining.config.home import expanded
from bert_pretraining.config.settings import FIELDS, Config, base_type
from bert_pretraining.config.toml import parse_toml
from bert_pretraining.config.trackers import split_names
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import cannot_read, not_the_kind, require_regular
from bert_pretraining.runtime.files import real


@dataclass(frozen=True)
class Resolved:
    """A configuration, its file, and the source of each field: a file, "flag" or "default"."""

    config: Config
    path: str
    sources: dict[str, str]


def configs_directory() -> Path:
    """`configs/` of the checkout, or its copy in an installed package."""
    checkout = Path(__file__).resolve().parents[3] / "configs"
    return checkout if checkout.is_dir() else Path(__file__).resolve().parents[1] / "configs"


def config_names() -> list[tuple[str, str]]:
    """Every shipped (name, config), without files that others extend (a leading underscore)."""
    paths = sorted(configs_directory().glob("*/*.toml"))
    return [(path.parent.name, path.stem) for path in paths if not path.stem.startswith("_")]


def parse_topology(config: str) -> tuple[int, int] | None:
    """`03V100x1x8` -> (1 node, 8 processes a node); None for a name of another form."""
    match = re.fullmatch(r".+?x(\d+)x(\d+)", config)
    return (int(match[1]), int(match[2])) if match else None


def resolve(flags: dict[str, object]) -> Resolved:
    """Resolve flags (name -> typed value) over TOML files over defaults. The flags name the file.

    A later source wins: a file over the files that it extends, a flag over any file.
    Raises UserError for an unknown configuration, key, type or value.
    """
    values = {field.name: field.default for field in FIELDS.values()}
    sources = dict.fromkeys(FIELDS, "default")
    name, config = flags.get("name", values["name"]), flags.get("config", values["config"])
    if "config" not in flags and (name, config) not in config_names():
        raise _config_missing(str(name))
    file = _config_path(str(name), str(config))
    layers = [
        (_shown(path), {key: _checked_key(key, value, path) for key, value in content.items()})
        for path, content in _file_layers(file)
    ]
    for source, layer in [*layers, ("flag", flags)]:
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
        _settle_switches(layer, source, values, sources)
    resolved = Config(**values)
    _validate(resolved, sources)
    return Resolved(resolved, _shown(file), sources)


# Upstream's switches whose meaning is one value of a setting: switch -> (setting, that value).
SWITCHES = {"fp16": ("precision", "fp16"), "exchange_padding": ("batching", "balanced")}
_WITHOUT_SWITCH = {"precision": "fp32", "batching": "random"}


def without_switches(settings: Mapping[str, object]) -> dict[str, object]:
    """The same settings with each switch replaced by the value that it stands for."""
    found = dict(settings)
    for switch, (setting, meaning) in SWITCHES.items():
        otherwise = meaning if found.pop(switch) else _WITHOUT_SWITCH[setting]
        found[setting] = found[setting] or otherwise
    return found


def _settle_switches(
    layer: dict[str, object], source: str, values: dict[str, object], sources: dict[str, str]
) -> None:
    """Make a switch and its setting consistent after a layer has set one of them.

    Raises UserError if one layer sets both and they contradict each other.
    """
    for switch, (setting, meaning) in SWITCHES.items():
        is_on, value = layer.get(switch), layer.get(setting)
        if switch in layer and setting in layer:
            if is_on != (value == meaning):
                where = "the command line" if source == "flag" else source
                raise UserError(
                    f"{where}: {switch} = {str(is_on).lower()} contradicts {setting} = {value!r}",
                    f"remove {switch}: {setting} is enough",
                )
        elif setting in layer and values[switch] and value != meaning:
            values[switch], sources[switch] = False, source
        elif switch in layer and (is_on or values[setting] == meaning):
            # A setting of None means what the switch says.
            values[setting], sources[setting] = None, source


def show(resolved: Resolved) -> str:
    """Every value and where it came from, as commented TOML."""
    lines = []
    for key, title in GROUPS.items():
        lines.append(f"# {title}")
        for field in FIELDS.values():
            if field.metadata["group"] == key:
                value = getattr(resolved.config, field.name)
                shown = f"{field.name} = {json.dumps(value)}"
                if value is None:
                    shown = f"# {field.name} is not set"
                lines.append(f"{shown:<52} # {resolved.sources[field.name]}")
        lines.append("")
    return "\n".join(lines)


def _shown(path: Path) -> str:
    """The path to print: configs/NAME/FILE for a shipped file, else the path as it is."""
    root = configs_directory().parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _config_missing(name: str) -> UserError:
    """--name alone, where that name has no configuration called as the default one."""
    configs = [pair[1] for pair in config_names() if pair[0] == name]
    if not configs:
        return _no_such_name(name)
    return UserError(
        f"--name {name} alone chooses no configuration: {name} has {', '.join(configs)}",
        f"add --config, such as --config {configs[-1]}",
    )


def _no_such_name(name: str) -> UserError:
    names = sorted({pair[0] for pair in config_names()})
    return UserError(
        f"--name {name}: no such name{nearest(name, names)}", f"use one of {', '.join(names)}"
    )


def _config_path(name: str, config: str) -> Path:
    if config.endswith(".toml"):
        return Path(config)
    path = configs_directory() / name / f"{config}.toml"
    if path.is_file() and not config.startswith("_"):
        return path
    pairs = config_names()
    if name not in {pair[0] for pair in pairs}:
        raise _no_such_name(name)
    configs = [pair[1] for pair in pairs if pair[0] == name]
    others = [pair[0] for pair in pairs if pair[1] == config]
    hint = nearest(config, configs)
    if others:
        hint = f"; it exists under {', '.join(others)}: add --name {others[0]}"
    raise UserError(
        f"--config {config}: no such configuration of {name}{hint} "
        f"({name} has: {', '.join(configs)})",
        "'python -m bert_pretraining config list' prints all",
    )


def _file_layers(path: Path) -> list[tuple[Path, dict]]:
    """The file and everything it extends, the most basic first."""
    layers: list[tuple[Path, dict]] = []
    while True:
        if any(real(path) == real(seen) for seen, _ in layers):
            raise UserError(f"{_shown(path)}: extends itself", "remove one 'extends' in the cycle")
        wrong_name = "correct --config, or the 'extends' that names it"
        require_regular(path, wrong_name)
        try:
            content = parse_toml(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise cannot_read(path, error, wrong_name) from error
        except UnicodeDecodeError as error:
            raise not_the_kind(path, "a configuration (TOML)", wrong_name, str(error)) from error
        except ValueError as error:
            raise UserError(
                f"{_shown(path)}: not valid TOML ({error})", "correct that line"
            ) from error
        parent = content.pop("extends", None)
        layers.insert(0, (path, content))
        if parent is None:
            return layers
        path = path.parent / f"{parent}.toml"


def _checked_key(key: str, value: object, path: Path) -> object:
    if isinstance(value, dict) or (isinstance(value, list) and dict in map(type, value)):
        raise UserError(
            f"{_shown(path)}: '{key}' is a table, but settings are keys outside tables, "
            "as in max_steps = 100",
            f"delete the line [{key}]",
        )
    if key not in FIELDS or key in ("name", "config"):
        known = [name for name in FIELDS if name not in ("name", "config")]
        raise UserError(
            f"{_shown(path)}: unknown key '{key}'{nearest(key, known)}",
            "correct or remove it; 'python -m bert_pretraining config show' prints all keys",
        )
    kind = base_type(FIELDS[key])
    if FIELDS[key].metadata["several"] and isinstance(value, list):
        value = ",".join(map(str, value))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(
            f"{_shown(path)}: key '{key}' must be {kind.__name__}, not {value!r}", "correct it"
        )
    return expanded(value) if isinstance(value, str) else value


def _validate(config: Config, sources: dict[str, str]) -> None:
    for field in FIELDS.values():
        value = getattr(config, field.name)
        if value is None:
            continue
        where = f"--{field.name} {value}"
        if sources[field.name] not in ("flag", "default"):
            where = f"{sources[field.name]}: {field.name} = {value}"
        choices = field.metadata["choices"]
        minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
        fault = None
        named = split_names(value) if field.metadata["several"] else [value]
        unknown = [name for name in named if choices and name not in choices]
        if unknown:
            which = f"'{unknown[0]}' " if len(named) > 1 else ""
            near = nearest(str(unknown[0]), list(choices))
            fault = f"{which}must be one of {', '.join(choices)}{near}"
        elif minimum is not None and not value >= minimum:
            fault = f"must be at least {minimum:g}"
        elif maximum is not None and not value <= maximum:
            fault = f"must be at most {maximum:g}"
        elif isinstance(value, float) and not math.isfinite(value):
            fault = "must be finite"
        elif field.metadata["fault"] is not None:
            fault = field.metadata["fault"](value)
        if fault:
            raise UserError(
                f"{where}: {fault}", f"{field.metadata['fix'] or f'correct {field.name}'}"
            )

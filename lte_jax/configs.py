"""How settings travel: frozen dataclass <-> JSON, a named config file, and ``--set a.b=value`` from the command line.

Holds no settings of its own. A field that may hold one of several dataclasses is written with its class name under
``"kind"``; a dataclass with its own ``to_dict`` and ``from_dict`` is written and read by them. A value that does not
fit its field, or an unknown key, is a one-line ``ConfigError`` with the value, the rule and the nearest known keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

NONE_TYPE = type(None)


class ConfigError(ValueError):
    """A setting that does not exist, or a value that does not fit it."""


def to_dict(config: Any) -> Any:
    """A dataclass as JSON-able dictionaries, lists and scalars; ``from_dict`` is its inverse."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        if hasattr(config, "to_dict"):
            return to_dict(config.to_dict())
        hints = _hints(type(config))
        return {name: _tagged(hint, getattr(config, name)) for name, hint in hints.items()}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise ConfigError(
        f"{config!r} of type {type(config).__name__} cannot be a setting: use numbers, text and dataclasses"
    )


def to_json(config: Any) -> str:
    """``to_dict`` as indented text."""
    return json.dumps(to_dict(config), indent=2)


def from_dict[T](cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """The dataclass ``cls`` from dictionaries: absent keys take their defaults, unknown ones are errors."""
    return _build(cls, data, where)


def override[T](config: T, assignments: Sequence[str]) -> T:
    """``config`` with each ``a.b=value`` applied in order; values are read as the type of the field they set."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {assignment!r}: write a.b=value")
        config = _replace(config, type(config), path.strip().split("."), text.strip(), path.strip())
    return config


def load_named(package: str, name: str) -> Any:
    """What ``get_config()`` of the module ``package.name`` returns; an unknown name lists the near ones."""
    folder = importlib.import_module(package)
    known = sorted(_module_names(folder))
    if name not in known:
        raise ConfigError(f"--config={name}: no such config.{_near(name, known)} Known: {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}").get_config()


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two ``to_dict`` trees: dotted key -> (old value, new value), absent = ``None``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(key for key in new if key not in old)]:
            found |= differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return {} if old == new else {prefix: (old, new)}


def _tagged(hint: Any, value: Any) -> Any:
    written = to_dict(value)
    if len(_classes(hint)) > 1 and dataclasses.is_dataclass(value):
        return {"kind": type(value).__name__, **written}
    return written


def _classes(hint: Any) -> dict[str, Any]:
    """The dataclasses that a field may hold, by name."""
    return {typing.cast(type, option).__name__: option for option in _options(hint) if dataclasses.is_dataclass(option)}


def _module_names(folder: types.ModuleType) -> set[str]:
    return {info.name for info in pkgutil.iter_modules(folder.__path__) if not info.name.startswith("_")}


def _near(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def _unknown_key(key: str, known: Sequence[str], where: str) -> ConfigError:
    return ConfigError(f"{where!r}: no setting {key!r}.{_near(key, known)} Known here: {', '.join(sorted(known))}")


def _replace(value: Any, hint: Any, path: list[str], text: str, where: str) -> Any:
    """``value`` with the setting at ``path`` read from ``text``."""
    if not path:
        return _build(hint, _from_text(hint, text), where)
    key, rest = path[0], path[1:]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        if key not in hints:
            raise _unknown_key(key, list(hints), where)
        changed = _replace(getattr(value, key), hints[key], rest, text, where)
        return _construct(type(value), {**_shallow(value), key: changed}, where)
    if isinstance(value, Mapping):
        if key not in value:
            raise _unknown_key(key, list(map(str, value)), where)
        arguments = typing.get_args(hint)
        inner = arguments[1] if len(arguments) == 2 else type(value[key])
        return {**value, key: _replace(value[key], inner, rest, text, where)}
    if isinstance(value, tuple) and key.isdigit():
        if int(key) >= len(value):
            raise ConfigError(f"{where!r}: index {key} of {len(value)} entries")
        inner = type(value[int(key)])
        return tuple(
            _replace(entry, inner, rest, text, where) if index == int(key) else entry
            for index, entry in enumerate(value)
        )
    raise ConfigError(f"{where!r}: {value!r} has no setting {key!r} inside")


def _shallow(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _construct(cls: type, values: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def _from_text(hint: Any, text: str) -> Any:
    """The JSON-able value that ``text`` stands for where a ``hint`` is wanted."""
    options = _options(hint)
    if NONE_TYPE in options and text.lower() in ("none", "null"):
        return None
    if str in options or any(typing.get_origin(option) is typing.Literal for option in options):
        return text
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if any(typing.get_origin(option) is tuple for option in options):
            return [_scalar(part.strip()) for part in text.split(",") if part.strip()]
        return _scalar(text)


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        try:
            return float(text)  # 1e-9 and inf, which JSON spells otherwise
        except ValueError:
            return text


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _build(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint`` says, or a ConfigError."""
    options = _options(hint)
    if len(options) > 1:
        return _build_union(options, value, where)
    origin = typing.get_origin(hint)
    if hint is Any or (isinstance(hint, type) and origin is None and _is_instance(value, hint)):
        return value
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value in allowed:
            return value
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, allowed))}")
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return _build_tuple(typing.get_args(hint), value, where)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        inner = typing.get_args(hint)[1]
        return {str(key): _build(inner, entry, f"{where}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"{where}: {value!r} where {name} is wanted")


def _is_instance(value: Any, hint: type) -> bool:
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint)


def _build_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NONE_TYPE in options:
        return None
    classes = _classes(typing.Union[options])  # noqa: UP007
    if len(classes) > 1 and isinstance(value, Mapping):
        kind = value.get("kind")
        if kind not in classes:
            raise ConfigError(f"{where}: kind {kind!r} is not one of {', '.join(classes)}")
        return _build(classes[kind], {key: entry for key, entry in value.items() if key != "kind"}, where)
    errors = []
    for option in options:
        if option is NONE_TYPE:
            continue
        try:
            return _build(option, value, where)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError("; or ".join(dict.fromkeys(errors)))


def _build_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {value!r} where the settings of {cls.__name__} are wanted")
    if hasattr(cls, "from_dict"):
        try:
            return cls.from_dict(dict(value))
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{where or cls.__name__}: {error}") from error
    hints = _hints(cls)
    for key in value:
        if key not in hints:
            raise _unknown_key(str(key), list(hints), where or cls.__name__)
    values = {key: _build(hints[key], entry, f"{where}.{key}" if where else key) for key, entry in value.items()}
    return _construct(cls, values, where)


def _build_tuple(arguments: tuple[Any, ...], value: Sequence[Any], where: str) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_build(arguments[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if len(arguments) != len(value):
        raise ConfigError(f"{where}: {len(value)} values where {len(arguments)} are wanted")
    pairs = zip(arguments, value, strict=True)
    return tuple(_build(argument, entry, f"{where}[{index}]") for index, (argument, entry) in enumerate(pairs))

"""Configurations: frozen dataclasses that know how to be a JSON file and a command line.

    @dataclass(frozen=True)
    class TrainConfig:
        steps: int = 100
        learning_rate: float = 3e-4

        def __post_init__(self):
            require_types(self)
            require_positive(self, "steps")
            require_finite(self, "learning_rate", low=0, high=1, low_open=True)

A field is a bool, int, float, str, `Literal`, a tuple of those, one of those or None, or a nested
configuration (records also hold `dict[str, ...]` and `Any`, which stands for any JSON value). The
file, the command line and the constructor go through one door, so each refuses the same values
with the same one-line `ConfigError`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from effjax.errors import ConfigError, EffjaxError, Preempted, near

C = TypeVar("C")
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def to_json(config: Any) -> dict[str, Any]:
    """Returns the configuration as JSON values; `from_json` of it is equal to the configuration."""
    return {name: _plain(getattr(config, name)) for name in _types(type(config))}


def from_json(cls: type[C], data: Any, default: C | None = None) -> C:
    """Builds a `cls` from JSON values, refusing whatever `cls` does not name or cannot hold.

    A key that `data` leaves out comes from `default`, or else from the class.

    Raises ConfigError: an unknown or missing key at any depth (with its dotted name and the nearest
    valid one), a value of another type (an integer may stand for a float; nothing else is
    converted), or whatever the class's own `__post_init__` refuses.
    """
    return _build(default, cls, data, ())


def digest(config: Any) -> str:
    """Returns the SHA-256 of the configuration's canonical JSON, in hexadecimal."""
    text = json.dumps(to_json(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(a: Any, b: Any) -> list[str]:
    """Lists where two configurations (or their JSON) differ, as `model.width: 256 != 512`."""
    left, right = (dict(_leaves(c if isinstance(c, dict) else to_json(c))) for c in (a, b))
    pairs = [(key, left.get(key, "absent"), right.get(key, "absent")) for key in {**left, **right}]
    return [f"{key}: {mine} != {theirs}" for key, mine, theirs in pairs if mine != theirs]


def read_json(path: str) -> Any:
    """Reads a JSON file strictly: UTF-8, no duplicate keys.

    Raises ConfigError naming the file and, where there is one, the place.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None


def require_types(config: Any) -> None:
    """Checks every field against its annotation, and settles int -> float and list -> tuple.

    Called first in a `__post_init__`; settling in place keeps equality, hash and digest the same
    whether a value came from Python, a file or the command line. Numbers must be finite.
    """
    owner = type(config).__name__
    for name, kind in _types(type(config)).items():
        value = _value(kind, getattr(config, name), (owner, name), _instance)
        object.__setattr__(config, name, value)


def require_finite(
    config: Any,
    name: str,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Requires a finite number within [low, high]; an open end is itself refused.

    A tuple is checked number by number; None (of an Optional field) passes.
    """
    for where, value in _numbers(config, name):
        inside = math.isfinite(value)
        inside &= low is None or (value > low if low_open else value >= low)
        inside &= high is None or (value < high if high_open else value <= high)
        if not inside:
            bounds = [
                low is not None and f"{'above' if low_open else 'at least'} {_shown(low)}",
                high is not None and f"{'below' if high_open else 'at most'} {_shown(high)}",
            ]
            wanted = " and ".join(bound for bound in bounds if bound) or "finite"
            raise ConfigError(f"{where} must be {wanted}, got {value!r}")


def _shown(bound: float) -> str:
    return f"{bound}" if isinstance(bound, int) else f"{bound:g}"


def require_positive(config: Any, *names: str, most: float | None = None) -> None:
    """Requires finite numbers above zero, and none above `most`."""
    for name in names:
        require_finite(config, name, low=0, high=most, low_open=True)


def require_divides(config: Any, divisor: str, name: str) -> None:
    """Requires the field `name` to be a multiple of the field `divisor`."""
    by, value = getattr(config, divisor), getattr(config, name)
    if by < 1 or value % by:
        owner = type(config).__name__
        raise ConfigError(f"{owner}.{name} must be a multiple of {divisor}={by}, got {value}")


def parse(
    cls: type[C],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    default: C | None = None,
) -> C:
    """Reads a configuration from a command line: `--config FILE.json`, then overrides.

    The words only ever become the field's own type: nothing in them is evaluated. `--help` prints
    the options and exits 0.

    Raises ConfigError for an unknown option (with the nearest one), a bad value or a bad file.
    """
    words, file = _take_option(list(sys.argv[1:] if args is None else args), "--config")
    default = default if default is not None else cls()
    if file is not None:
        default = from_json(cls, read_json(file), default)
    raw, unknown = _tyro(cls, [w for w in words if w != "--debug"], prog, description, default)
    for word in unknown:
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; see --help")
        option = word.split("=")[0]
        raise ConfigError(f"unknown option {option}{near(option, _options(cls))}; see --help")
    return from_json(cls, to_json(raw))


def cli(cls: type[C], args: Sequence[str] | None = None, **kwargs: Any) -> C:
    """`parse`, for a script's first line: a refusal is printed as one line and exits 2."""
    parsed: list[C] = []
    if code := main(parsed.append, cls, args, **kwargs):
        raise SystemExit(code)
    return parsed[0]


def main(
    run: Callable[[C], int | None], cls: type[C], args: Sequence[str] | None = None, **kwargs: Any
) -> int:
    """Runs a command, `raise SystemExit(main(run, Config))`, and returns its exit code.

    A refusal (`EffjaxError`), from the options or from `run`, is one line on stderr and its own
    exit code. What nobody foresaw is one line too, and exits 1. `--debug` raises either with its
    traceback. An interruption exits 75; what is finished is `run`'s to save.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        return run(parse(cls, words, **kwargs)) or 0
    except KeyboardInterrupt:
        return _say("interrupted", Preempted.exit_code)
    except Exception as error:
        if "--debug" in words:
            raise
        if isinstance(error, EffjaxError):
            return _say(str(error), error.exit_code)
        return _say(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _say(message: str, exit_code: int) -> int:
    print(f"error: {' '.join(message.split())[:1000]}", file=sys.stderr, flush=True)
    return exit_code


def _types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)


def _build(default: C | None, cls: type[C], data: Any, path: tuple[str, ...]) -> C:
    kinds = _types(cls)
    if not isinstance(data, Mapping):
        raise _wrong(path or (cls.__name__,), "an object of named values", data)
    for key in data:
        if key not in kinds:
            raise ConfigError(f"unknown key {'.'.join((*path, key))!r}{_suggest(key, cls)}")
    values = {} if default is None else {name: getattr(default, name) for name in kinds}
    for name in kinds.keys() & data.keys():
        build = functools.partial(_build, values.get(name))
        values[name] = _value(kinds[name], data[name], (*path, name), build)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ConfigError(f"missing key {'.'.join((*path, field.name))!r} of {cls.__name__}")
    return cls(**values)


def _instance(kind: type, value: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(value, kind):
        raise _wrong(path, f"a {kind.__name__}", value)
    return value


def _value(kind: Any, value: Any, path: tuple[str, ...], nested: Callable) -> Any:
    """The value as `kind` holds it; `nested(kind, value, path)` settles a nested configuration."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (k for k in inner if k is not type(None))
        return _value(kind, value, path, nested)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
        wanted = "one of " + ", ".join(map(repr, inner))
        raise _wrong(path, wanted, value, near(str(value), map(str, inner)))
    if origin is tuple:
        return _tuple(inner, value, path, nested)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(path, "an object of named values", value)
        return {k: _value(inner[1], item, (*path, k), nested) for k, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return nested(kind, value, path)
    return _scalar(kind, value, path)


def _tuple(inner: tuple, value: Any, path: tuple[str, ...], nested: Callable) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise _wrong(path, "a list", value)
    kinds = inner
    if len(inner) == 2 and inner[1] is Ellipsis:
        kinds = inner[:1] * len(value)
    if len(kinds) != len(value):
        raise _wrong(path, f"a list of {len(kinds)}", value)
    *parents, name = path
    places = [(*parents, f"{name}[{i}]") for i in range(len(value))]
    return tuple(_value(k, v, p, nested) for k, v, p in zip(kinds, value, places, strict=True))


def _scalar(kind: Any, value: Any, path: tuple[str, ...]) -> Any:
    if kind is Any:
        try:
            return json.loads(json.dumps(_plain(value), allow_nan=False))
        except (TypeError, ValueError):
            raise _wrong(path, "a JSON value", value) from None
    if kind not in _NAMES:
        raise TypeError(f"{'.'.join(path)} has type {kind}, which no configuration can hold")
    same = isinstance(value, (int, float) if kind is float else kind)
    if not same or (isinstance(value, bool) and kind is not bool):
        raise _wrong(path, _NAMES[kind], value)
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise _wrong(path, "a finite number", value)
    return value


def _wrong(path: Iterable[str], wanted: str, got: Any, hint: str = "") -> ConfigError:
    shown = repr(got)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ConfigError(f"{'.'.join(path)} must be {wanted}, got {shown}{hint}")


def _keys(cls: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in _types(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{name}.")


def _suggest(key: str, cls: Any) -> str:
    deeper = [dotted for dotted in _keys(cls) if dotted.rpartition(".")[2] == key]
    return near(key, _types(cls)) or (f"; did you mean {deeper[0]!r}?" if deeper else "")


def _numbers(config: Any, name: str) -> Iterator[tuple[str, float]]:
    where, value = f"{type(config).__name__}.{name}", getattr(config, name)
    if isinstance(value, tuple):
        yield from ((f"{where}[{i}]", item) for i, item in enumerate(value))
    elif value is not None:
        yield where, value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in names if names.count(k) > 1)!r} appears twice")
    return data


def _take_option(words: list[str], option: str) -> tuple[list[str], str | None]:
    """Takes `option VALUE` or `option=VALUE` out of the words."""
    found = [i for i, word in enumerate(words) if word.split("=")[0] == option]
    if not found:
        return words, None
    at, width = found[0], 1 if "=" in words[found[0]] else 2
    value = "=".join(words[at : at + width]).partition("=")[2]
    if len(found) > 1 or not value or value.startswith("--"):
        raise ConfigError(f"{option} takes one file, once; got {' '.join(words[at:])!r}")
    return words[:at] + words[at + width :], value


def _options(cls: Any) -> Iterator[str]:
    for dotted in ("config", "debug", *_keys(cls)):
        yield "--" + dotted.replace("_", "-")


def _tyro(
    cls: type[C], words: list[str], prog: str | None, description: str | None, default: C
) -> tuple[Any, list[str]]:
    """Lets tyro parse into a twin of `cls` that refuses no value; `from_json` does, on one line."""
    import tyro

    note = (
        "--config FILE.json starts from the file that a run wrote; options override it. "
        "--debug shows the traceback of a refusal."
    )
    doc = cls.__doc__ or ""
    about = description or ("" if doc.startswith(f"{cls.__name__}(") else doc)
    twin = _twin(cls)
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(
                twin,
                args=words,
                prog=prog,
                description=f"{about}\n\n{note}".strip(),
                default=from_json(twin, to_json(default)),
                return_unknown_args=True,
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise ConfigError(_unframed(framed.getvalue())) from None


def _twin(cls: Any) -> Any:
    fields = []
    for field in dataclasses.fields(cls):
        kind = _types(cls)[field.name]
        kind = _twin(kind) if dataclasses.is_dataclass(kind) else kind
        fields.append((field.name, kind, dataclasses.field(default=None)))
    # Under the class's own name tyro finds the comments that become the options' help.
    names = {"__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
    body = {"__post_init__": lambda self: None, **names}
    twin = dataclasses.make_dataclass(
        cls.__name__, fields, bases=(cls,), namespace=body, frozen=True
    )
    twin.__module__ = cls.__module__
    if hasattr(cls, "__firstlineno__"):  # since Python 3.13; naming the module drops it
        twin.__firstlineno__ = cls.__firstlineno__  # type: ignore[attr-defined]
    return twin


def _unframed(text: str) -> str:
    """The first paragraph inside a frame drawn with box characters, on one line."""
    lines = [line.strip(" │|") for line in text.splitlines()[1:]]
    paragraph = itertools.takewhile(lambda line: not set(line) <= set("─╰╯-+"), lines)
    return (" ".join(paragraph) or " ".join(text.split())).removeprefix("Error parsing ")

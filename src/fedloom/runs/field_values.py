"""Values of a run's fields as people write them: after `--set`, in a TOML run file, in the grid of a sweep.

Each value is checked against the declared type of its field. A text is read as a Python literal, a public name of fedloom, or a
value made of one (`HLoRA(rank=16)`); no other code is ever run.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from datetime import date, time
from types import NoneType
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from fedloom.core.errors import Refused
from fedloom.core.schema import (
    TABLES,
    UNIONS,
    check_scalar,
    declared_fields,
    describe_type,
    implements,
    is_protocol,
    matches_exactly,
    matches_type,
)
from fedloom.core.text import did_you_mean, first_line, list_some
from fedloom.runs.public_names import HOMES, all_names, public_name
from fedloom.runs.run import Run

MOST_LISTED = 30
"""Kinds of values that a message lists at most."""
LONGEST_SHOWN = 80
"""Characters of a text that a message repeats."""
WORD = "type"
"""The key that names the class of a table, as in a manifest."""
Read: TypeAlias = Callable[[Any, Any, object, str], object]
"""Makes the value of a field of what somebody wrote, the field's type, its value now, and its path."""


def replace_field(run: Run, path: str, value: object) -> Run:
    """Return the run with this value in the field at `path`, such as "schedule.cohort_size"; a bare class becomes an instance.

    Raises Refused for an unknown field or a value of a wrong kind.
    """

    def make(hint: Any, current: object) -> object:
        return _number(fit(value, hint, current, path), hint)

    changed: Run = _replaced(run, path.split("."), path, make)
    return changed


def replace_text(run: Run, path: str, text: str) -> Run:
    """Return the run with the value that `text` is written for in the field at `path`. Raises Refused."""
    changed: Run = _replaced(run, path.split("."), path, lambda hint, current: read_text(text, hint, current, path))
    return changed


def _replaced(owner: Any, names: Sequence[str], path: str, make: Callable[[Any, object], object]) -> Any:
    name, rest = names[0], names[1:]
    have = [field.name for field in fields(owner) if field.init] if is_dataclass(owner) else []
    if name not in have:
        raise Refused("--set", path, _no_field(name, type(owner).__name__, have))
    kind: Any = type(owner)
    hint, current = declared_fields(kind)[name], getattr(owner, name)
    return replace(owner, **{name: _replaced(current, rest, path, make) if rest else make(hint, current)})


def _no_field(name: str, owner: str, have: Sequence[str]) -> str:
    """Say that there is no such field, which was probably meant, and which there are."""
    if owner == NoneType.__name__:
        return "it is switched off (None); set it as a whole, for instance hierarchy=Hierarchy(rounds=3)"
    near = did_you_mean(name, have)
    has = f"{owner} has: {', '.join(have)}" if have else f"{owner} has no fields"
    return " ".join(filter(None, [f"there is no field {name!r};", near, has]))


# Text -----------------------------------------------------------------------------------------------------------------


def read_text(text: str, hint: Any, current: object, path: str) -> object:
    """Return the value that `text` is written for; where text is expected and nothing else fits, the text itself. Raises Refused."""
    plain = matches_type(text, hint)
    if plain and text.isidentifier() and text not in ("None", "True", "False"):
        return text  # a word, and no slip for a public name
    try:
        value = _evaluate(ast.parse(text, mode="eval").body, path)
    except Refused:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if plain:
            return text
        raise Refused(path, shortened(text), f"expected {expected_value(hint, current)}") from error
    check_scalar(path, value)
    if plain and not matches_type(value, hint):
        return text
    return _number(fit(value, hint, current, path, text), hint)


def _number(value: object, hint: Any) -> object:
    """Return a whole number as a float where only that is declared."""
    return float(value) if type(value) is int and not matches_exactly(value, hint) else value


def shortened(text: str) -> str:
    """Return the beginning of a long text, for a message.

    >>> shortened("7" * 100)[-7:]
    '7777...'
    """
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def _evaluate(node: ast.expr, path: str) -> Any:
    """Evaluate literals, public names, and calls of them with such arguments. No other code is ever run."""
    if isinstance(node, ast.Name | ast.Call) and isinstance(name := getattr(node, "func", node), ast.Name):
        if not is_public(name.id):
            if near := did_you_mean(name.id, all_names()):
                raise Refused(path, name.id, f"there is no such name; {near}")
        elif isinstance(node, ast.Name):
            return public_name(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise Refused(path, shortened(ast.unparse(node)), "write each field by its name, without **")
        named = {str(keyword.arg): _evaluate(keyword.value, path) for keyword in node.keywords}
        kind = _evaluate(node.func, path)
        if not isinstance(kind, type) or not is_dataclass(kind):
            raise Refused(path, ast.unparse(node), f"{node.func.id} is no kind of value and cannot be called here")
        return make_value(kind, [_evaluate(argument, path) for argument in node.args], named, path)
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item, path) for item in node.elts)
    return ast.literal_eval(node)


def is_public(name: str) -> bool:
    """Whether fedloom offers this name, or an earlier one of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a name is an older one is told when its value is taken
            public_name(name)
    except AttributeError:
        return False
    return True


# Values ---------------------------------------------------------------------------------------------------------------


def fit(value: Any, hint: Any, current: object, path: str, text: str | None = None) -> object:
    """Return a value as a field of this type takes it: a bare class as an instance.

    Raises Refused for a value of another kind, which is shown as the `text` that stands for it.
    """
    check_scalar(path, value)
    if isinstance(value, type) and _is_kind(value, hint):
        value = make_value(value, (), {}, path)
    if matches_type(value, hint) and _is_function_for(value, hint):
        return value
    raise Refused(path, value if text is None else shortened(text), f"expected {expected_value(hint, current)}")


def make_value(
    kind: type, values: Sequence[object], named: Mapping[str, object], path: str, read: Read = fit
) -> object:
    """Make a value of this dataclass, each of its fields read by `read`.

    Raises Refused for a field that it does not have, lacks, or does not take.
    """
    signature = inspect.signature(kind)
    has = [*signature.parameters]
    for name in named:
        if name not in has:
            raise Refused(path or "FILE", name, _no_field(name, kind.__name__, has))
    try:
        given = signature.bind(*values, **named).arguments
    except TypeError as error:  # too many values, one field twice, or one missing
        reason = str(error).replace("a required argument: ", "its field ")
        raise Refused(path or "FILE", kind.__name__, f"{reason}; {kind.__name__} has: {', '.join(has)}") from error
    hints, defaults = declared_fields(kind), _defaults(kind)
    parts = {name: read(one, hints[name], defaults.get(name), _joined(path, name)) for name, one in given.items()}
    return _build(lambda: kind(**parts), kind, path)


def _build(make: Callable[[], object], kind: type, path: str) -> object:
    """Make a value. Raises Refused where its class does not take what is of the right types."""
    try:
        return make()
    except Refused:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise Refused(path, kind.__name__, f"it cannot be made of these values: {first_line(error)}") from error


def _defaults(kind: type) -> dict[str, object]:
    factories = {one.name: one.default_factory for one in fields(kind)}  # type: ignore[arg-type]
    made = {name: factory() for name, factory in factories.items() if factory is not MISSING}
    return made | {one.name: one.default for one in fields(kind) if one.default is not MISSING}  # type: ignore[arg-type]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of which a field takes one."""
    return get_args(hint) if get_origin(hint) in UNIONS else (hint,)


def _is_kind(kind: type, hint: Any) -> bool:
    """Whether an instance of this class is a value for a field of this type."""
    return is_dataclass(kind) and any(_is_kind_of(kind, one) for one in _options(hint))


def _is_kind_of(kind: type, option: Any) -> bool:
    if is_protocol(option):
        return implements(kind, option)
    if get_origin(option) is Callable:
        return any("__call__" in vars(base) for base in kind.__mro__)
    return isinstance(option, type) and get_origin(option) is None and issubclass(kind, option)


def _is_function_for(value: object, hint: Any) -> bool:
    """Whether a value is no function of fedloom, or one with the arguments and the result that the field asks for."""
    if not inspect.isfunction(value) or not value.__module__.startswith("fedloom."):
        return True
    calls = [get_args(one) for one in _options(hint) if get_origin(one) is Callable]
    return [*get_type_hints(value).values()] in [[*arguments, result] for arguments, result in calls]


def expected_value(hint: Any, current: object) -> str:
    """Describe what a field of this type takes, in words for a person, with the names of the classes that fit."""
    kinds = _kinds(hint)
    return f"{describe_type(hint, current)}{': one of ' if kinds else ''}{list_some(kinds, MOST_LISTED)}"


def _kinds(hint: Any) -> list[str]:
    """The public classes whose instances fit, by name, where a field asks for a protocol."""
    if not any(map(is_protocol, _options(hint))):
        return []
    settings = [name for name in all_names() if not HOMES.get(name, "").startswith("fedloom.runs.")]
    values = {name: public_name(name) for name in settings}  # without what carries runs out, which imports transformers
    return [name for name, value in values.items() if isinstance(value, type) and _is_kind(value, hint)]


# Tables of TOML -------------------------------------------------------------------------------------------------------


def read_data(data: Any, hint: Any, current: object, path: str) -> object:
    """Return the value of a field that data of TOML stand for. Raises Refused.

    A table makes a value of the class that its `type` names; without one it changes fields of the default. A list is a tuple, and
    "None" is None where the field takes it. Another text is read as `read_text` does, unless the field takes text.
    """
    if isinstance(data, date | time):
        data = data.isoformat()
    if isinstance(data, str):
        check_scalar(path, data)
        is_text = data != "None" and matches_type(data, hint)
        return data if is_text else read_text(data, hint, current, path)
    if isinstance(data, dict) and not any(get_origin(one) in TABLES for one in _options(hint)):
        return _read_table(data, hint, current, path)
    if isinstance(data, list):
        items = next((get_args(one)[0] for one in _options(hint) if get_origin(one) is tuple), None)
        if items is not None:
            data = tuple(read_data(item, items, None, f"{path}[{place}]") for place, item in enumerate(data))
    return fit(data, hint, current, path)


def _read_table(data: Mapping[str, Any], hint: Any, current: Any, path: str) -> object:
    given = {name: value for name, value in data.items() if name != WORD}
    declared = [one for one in _options(hint) if is_dataclass(one)]
    if WORD in data or (not is_dataclass(current) and len(declared) == 1):
        kind: Any = _named_kind(data[WORD], hint, current, path) if WORD in data else declared[0]
        return make_value(kind, (), given, path, read_data)
    if not is_dataclass(current) or isinstance(current, type):
        raise Refused(path, "a table", f'say what it is with {WORD} = "..."; expected {expected_value(hint, current)}')
    hints = declared_fields(type(current))
    for name in given:
        if name not in hints:
            raise Refused(path, name, _no_field(name, type(current).__name__, [*hints]))
    parts = {
        name: read_data(value, hints[name], getattr(current, name), _joined(path, name))
        for name, value in given.items()
    }
    return _build(lambda: replace(current, **parts), type(current), path)


def _named_kind(word: object, hint: Any, current: object, path: str) -> Any:
    """Return the class of this name. Raises Refused where there is none, or none that fits."""
    if isinstance(word, str) and is_public(word):
        kind = public_name(word)
        if isinstance(kind, type) and _is_kind(kind, hint):
            return kind
    near = did_you_mean(word, _kinds(hint)) if isinstance(word, str) else ""
    raise Refused(
        _joined(path, WORD), word, " ".join(filter(None, [near, f"expected {expected_value(hint, current)}"]))
    )

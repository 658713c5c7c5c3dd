"""The options of a command, read from dataclasses, and values parsed by tyro."""

import ast
import contextlib
import dataclasses
import enum
import functools
import inspect
import io
import textwrap
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union

from jaxpref.cli.words import Given, canonical, closest
from jaxpref.errors import InputError
from jaxpref.runtime.ranges import check_text, checked

REQUIRED = dataclasses.MISSING


class Part(NamedTuple):
    """A dataclass whose fields are options."""

    type: type
    prefix: str = ""
    """Namespace of its options: "loss" for `--loss.beta`."""


Parts = Mapping[str, Part]
"""The parts of a command's config by field name."""


class Option(NamedTuple):
    """One option, as the user types it."""

    name: str
    """Without its dashes."""
    type: Any
    default: Any
    """`REQUIRED` if it has none."""
    help: str

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value: `--name` or `--no-name`."""
        return self.type is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values, if there is a fixed list of them."""
        return tuple(word for kind in _members(self.type) for word in _words(kind))

    @property
    def metavar(self) -> str:
        """A placeholder for its value."""
        if self.is_flag:
            return ""
        kinds = [kind for kind in _members(self.type) if kind is not type(None)]
        return "|".join(word for kind in kinds for word in _typed(kind))


def options_of(parts: Parts) -> dict[str, Option]:
    """All options of a command, by name."""
    found = {}
    for part in parts.values():
        found |= {option.name: option for option in _of(part.type, part.prefix)}
    return found


def parse(
    parts: Parts,
    given: Given,
    *,
    command: str,
    about: str = "",
    also: Collection[str] = (),
) -> Any:
    """An object with a field for each part, made from the given options.

    Args:
      parts: the parts of the command.
      given: its options, from `words.split`.
      command: the command, for messages: "jaxpref train".
      about: further context, for messages: " --loss rdpo".
      also: further options that the command reads itself, for suggestions.

    Raises:
      InputError: if an option is unknown or missing, or has a value of the wrong type
        or out of range.
    """
    options = options_of(parts)
    if "template" in options:
        given = _with_template(given)
    names = set(options) | {f"no-{o.name}" for o in options.values() if o.is_flag}
    for name, values in given.items():
        for value in values:
            check_text(name, value)
        if name not in names:
            raise InputError(
                f"--{name}: {command}{about} has no such option"
                f"{closest(name, {*names, *also}, '--')}"
            )
    for name in given:
        if f"no-{name}" in given:
            raise InputError(f"--{name}: given together with --no-{name}")
    missing = [n for n, o in options.items() if o.default is REQUIRED]
    if missing := [name for name in missing if name not in given]:
        raise InputError(
            f"{command}{about}: needs {', '.join(f'--{name}' for name in missing)}; "
            f"`{command} --help` explains them"
        )
    words = [word for name, values in given.items() for word in _spelled(name, values)]
    # Only these: the parser of all options takes a tenth of a second to build.
    typed = {n: o for n, o in options.items() if n in given or f"no-{n}" in given}
    try:
        values = vars(_tyro(_flat(typed), words)).values() if typed else ()
    except SystemExit:
        for name, values in given.items():
            _check_value(name, options.get(name), values)
        raise InputError(f"{command}: cannot read {' '.join(words)}") from None
    by_name = {name: option.default for name, option in options.items()}
    by_name |= zip(typed, values)
    made = {
        field: checked(_make(part.type, part.prefix, by_name), part.prefix)
        for field, part in parts.items()
    }
    return types.SimpleNamespace(**made)


def _with_template(given: Given) -> Given:
    """The options with `--template.NAME VALUE` as `--template NAME=VALUE`.

    In a config file, true and false are flags.
    """
    rest, words = {}, []
    for name, values in given.items():
        _, _, variable = name.partition("template.")
        if name not in (f"template.{variable}", f"no-template.{variable}"):
            rest[name] = values
            continue
        value = " ".join(values) or ("false" if name.startswith("no-") else "true")
        words.append(f"{variable.replace('-', '_')}={value}")
    if words:
        rest["template"] = [*rest.get("template", []), *words]
    return rest


def _spelled(name: str, values: Sequence[str]) -> list[str]:
    if name.startswith("no-") and "." in name:  # tyro's spelling in a namespace
        group, _, flag = name.removeprefix("no-").rpartition(".")
        name = f"{group}.no-{flag}"
    return [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]


def _tyro(kind: Any, words: Sequence[str]) -> Any:
    import tyro

    # tyro prints some errors despite `console_outputs`.
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            kind,
            args=list(words),
            console_outputs=False,
            add_help=False,
            config=(tyro.conf.EnumChoicesFromValues, tyro.conf.AvoidSubcommands),
        )


def _flat(options: Mapping[str, Option]) -> type:
    """A dataclass with a field for each option, in order, without checks.

    If the real dataclasses were used, tyro would report errors of their checks itself.
    """
    import tyro

    fields = []
    for number, option in enumerate(options.values()):
        # Without a help text, tyro would search for one in this file, slowly.
        kind = Annotated[option.type, tyro.conf.arg(name=option.name, help=" ")]
        default = dataclasses.field()
        if option.default is not REQUIRED:
            default = dataclasses.field(default=option.default)
        fields.append((f"option_{number}", kind, default))
    return dataclasses.make_dataclass("Options", fields, kw_only=True)


def _make(kind: type, prefix: str, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from the values of its options."""
    hints = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        name = _name(field, prefix)
        nested = dataclasses.is_dataclass(hints[field.name])
        given[field.name] = (
            _make(hints[field.name], name, values) if nested else values[name]
        )
    return kind(**given)


def _name(field: dataclasses.Field, prefix: str) -> str:
    name = canonical(field.name)
    return f"{prefix}.{name}" if prefix else name


def _check_value(name: str, option: Option | None, values: Sequence[str]) -> None:
    """Raises an InputError if this option could not be parsed."""
    if option is None or option.is_flag:
        if values:
            raise InputError(f"--{name} {' '.join(values)}: takes no value")
        return
    if not values:
        raise InputError(f"--{name}: expected a value after it: {option.metavar}")
    alone = option._replace(name="value", default=REQUIRED)
    try:
        _tyro(_flat({"value": alone}), _spelled("value", values))
    except SystemExit:
        raise InputError(
            f"--{name} {' '.join(values)}: expected {option.metavar}"
            f"{closest(values[0], option.choices)}"
        ) from None


def _of(kind: type, prefix: str) -> list[Option]:
    hints = typing.get_type_hints(kind, include_extras=True)
    docs = _docs(kind)
    found = []
    # A class's own options come before those that several commands share.
    own = inspect.get_annotations(kind)
    for field in sorted(dataclasses.fields(kind), key=lambda x: x.name not in own):
        name = _name(field, prefix)
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += _of(hint, name)
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = field.metadata.get("help") or docs.get(field.name, "")
        found.append(Option(name, hint, default, text))
    return found


@functools.cache
def _docs(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of its base classes."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (TypeError, OSError):  # built in, or made by a call
            continue
        (node,) = ast.parse(source).body
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in zip(body, body[1:]):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(said))),
                ):
                    found[name] = " ".join(said.split())
    return found


def _members(kind: Any) -> tuple[Any, ...]:
    """A union's members, or the type alone."""
    union = typing.get_origin(kind) in (Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _words(kind: Any) -> tuple[str, ...]:
    if typing.get_origin(kind) is Literal:
        return tuple(map(str, typing.get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return tuple(str(member.value) for member in kind)
    return ()


def _typed(kind: Any) -> tuple[str, ...]:
    if typing.get_origin(kind) is tuple:
        return (f"{_typed(typing.get_args(kind)[0])[0]} ...",)
    return _words(kind) or ("TEXT" if kind is str else kind.__name__.upper(),)

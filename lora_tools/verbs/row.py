"""One row of the table of verbs: what a verb is called with, and what is said of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import numbers
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lora_tools import totals
from lora_tools.errors import UsageError
from lora_tools.options.fields import KEY, Option, nearest
from lora_tools.records import Report
from lora_tools.verbs.values import check_place, dtype_name, listed, one_adapter, several

_PARAMETER = inspect.Parameter
_PLACE = "str | Path | Mapping[str, Any]"
_ADAPTER = f"{_PLACE} | tuple[{_PLACE}, float]"
_ADAPTERS = f"{_ADAPTER} | Sequence[{_ADAPTER}]"


@dataclasses.dataclass(frozen=True)
class Argument:
    """A positional argument of the public function; all are paths, or state dicts where they are
    read as tensors. ``out`` is ``-o`` on the command line, and ``adapters`` are several: at least
    one where they are ``needed``."""

    name: str
    needed: bool = True

    @property
    def several(self) -> bool:
        return self.name == "adapters"

    @property
    def type(self) -> str:
        if self.several:
            return _ADAPTERS
        return _PLACE if self.takes_tensors else "str | Path"

    @property
    def takes_tensors(self) -> bool:
        """Whether a state dict can be given. A ``model`` is run, which takes its config."""
        return self.name not in ("model", "text", "out")


@dataclasses.dataclass(frozen=True)
class Keyword:
    """A keyword of the public function: one field of a record.

    Attributes:
        record: the field's.
        option: what the command line makes of it; None: nothing.
        default: ``dataclasses.MISSING`` where it must be given.
        written: its type, as the record has it.
    """

    name: str
    record: type[Any]
    option: Option | None
    default: Any
    written: str

    @property
    def flag(self) -> str:
        """Its long option, as errors name it."""
        flags = self.option.flags if self.option is not None else ()
        long = next((flag for flag in flags if flag.startswith("--")), "")
        return long.partition("/")[0] or "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @functools.cached_property
    def type(self) -> Any:
        """Its type, None aside."""
        hint = get_type_hints(self.record)[self.name]
        rest = [each for each in get_args(hint) if each is not type(None)]
        return rest[0] if type(None) in get_args(hint) and len(rest) == 1 else hint

    @functools.cached_property
    def choices(self) -> tuple[Any, ...]:
        """What its value can be, or what each of its values can be; () where that is open."""
        if get_origin(self.type) is Literal:
            return get_args(self.type)
        table = self.option.choices if self.option is not None else None
        return () if table is None else tuple(table())

    @property
    def listed(self) -> bool:
        """Whether the choices stand for the value in the help, and in the type."""
        return bool(self.choices) and self.option is not None and self.option.metavar is None

    @property
    def several(self) -> bool:
        return get_origin(self.type) is Sequence

    @property
    def takes_tensors(self) -> bool:
        """Whether a state dict can be given."""
        return self.option is not None and self.option.path == "tensors"

    @property
    def of_dtype(self) -> bool:
        """Whether a dtype of torch can be given for its name."""
        return self.name in ("dtype", "compute_dtype", "quant_storage")

    @property
    def annotation(self) -> str:
        """Its type in the function's signature: a Literal where choices are listed, and one adapter
        where several can be."""
        if self.name == "adapters":
            return _ADAPTERS
        if self.takes_tensors:
            return self.written.replace("str | Path", _PLACE)
        if not self.listed or "Literal" in self.written:
            return self.written
        return self.written.replace("str", f"Literal[{', '.join(map(repr, self.choices))}]")

    def plain(self, value: Any) -> Any:
        """What stands for a value in the record: of one adapter a tuple, of torch's dtype its
        name."""
        if self.of_dtype:
            return dtype_name(value)
        if self.name == "adapters" and one_adapter(value):
            return (value,)
        return value

    def check(self, value: Any) -> None:
        """
        Raises:
            UsageError: it is none of the choices, not in the range, or means nothing.
            TypeError: it is of another type.
        """
        if value is None or self.option is None:
            return
        for each in value if self.several and listed(value) else (value,):
            if self.choices and each not in self.choices:
                names = ", ".join(map(str, self.choices))
                shown = repr(each) if isinstance(each, str) else each
                hint = nearest(each, self.choices)
                raise UsageError(
                    f"{self.flag} {shown}: one of {names} is needed"
                    + (f"; {hint[0].lower()}{hint[1:]}" if hint else "")
                )
        number = isinstance(value, numbers.Real)
        if self.option.allowed is not None and number and not self.option.allowed[0](value):
            raise UsageError(f"{self.flag} {value}: {self.option.allowed[1]}")
        if not self._suits(value):
            raise TypeError(f"{self.name} must be {self.written}, not {value!r}")
        if self.option.parse is not None:
            self.option.parse(value)

    def typed(self, value: Any) -> list[str]:
        """The words by which the command line gives it that value."""
        if self.type is bool:
            flags = self.option.flags if self.option is not None else ()
            off = next((flag.partition("/")[2] for flag in flags if "/" in flag), "")
            return [self.flag if value else off]
        values = value if self.several else (value,)
        return [word for each in values for word in (self.flag, str(each))]

    def _suits(self, value: Any) -> bool:
        """Whether a value is of its type, as far as a mistake would go unseen: a text is a sequence
        of letters, a fraction may be cut, ``"no"`` is true."""
        if self.several:
            return listed(value)
        kind = _KINDS.get(self.type, object)
        return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


_KINDS: dict[Any, type] = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}


def take(record: type[Any], *names: str, **said: Mapping[str, Any]) -> tuple[Keyword, ...]:
    """Fields of a record that a verb takes, all where none is named, with what this verb says
    otherwise of one: attributes of ``Option``."""
    fields = {field.name: field for field in dataclasses.fields(record)}
    result = []
    for name in names or fields:
        field = fields[name]
        option: Option | None = field.metadata.get(KEY)
        if option is not None and name in said:
            option = dataclasses.replace(option, **said[name])
        result.append(Keyword(name, record, option, field.default, str(field.type)))
    return tuple(result)


def called(record: type[Any]) -> str:
    """The keyword by which a function takes a record: ``AdapterForm`` → ``adapter_form``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", record.__name__).lower()


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        name: of the function in the file of the same name; the command has hyphens.
        arguments: positional.
        keywords: in the order of the command line's help.
        short, text, example: of ``--help``.
        order: names of the keywords that come first in the signature, and in the command that
            artifacts record; the others follow as in ``keywords``.
        first: names of the keywords that most people need, for the head of ``--help``.
        usage: the options that must be given, for the first line of ``--help``.
        adds_to: the argument whose folder may be the output, where the verb only adds files to it.
    """

    name: str
    arguments: tuple[Argument, ...]
    keywords: tuple[Keyword, ...]
    short: str
    text: str
    example: str
    first: str
    order: str = ""
    usage: str = ""
    adds_to: str = ""

    @property
    def command(self) -> str:
        """What it is called on the command line."""
        return self.name.replace("_", "-")

    @property
    def writes(self) -> bool:
        """Whether it makes something; else it looks, and reports."""
        return any(argument.name == "out" for argument in self.arguments)

    @functools.cached_property
    def by_name(self) -> dict[str, Keyword]:
        """The keywords, in the order of the signature."""
        known = {keyword.name: keyword for keyword in self.keywords}
        return {name: known[name] for name in (*self.order.split(), *known)}

    @functools.cached_property
    def records(self) -> dict[str, type[Any]]:
        """The records that their fields belong to, by the keyword for the whole record."""
        return {called(keyword.record): keyword.record for keyword in self.keywords}

    @property
    def totals(self) -> str:
        """The name, in ``totals.py``, of the type of its report's totals."""
        return self.name.title().replace("_", "") + "Totals"

    @property
    def returns(self) -> Any:
        """The type of its report."""
        return Report[getattr(totals, self.totals)]  # type: ignore[misc]

    def function(self) -> Callable[..., Report[Any]]:
        """The public function, which is imported for it."""
        module = importlib.import_module(f"lora_tools.verbs.{self.name}")
        function: Callable[..., Report[Any]] = getattr(module, self.name)
        return function

    def bind(self, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name. Raises TypeError, as Python does for a call that does not fit."""
        names = [argument.name for argument in self.arguments]
        if len(args) > len(names):
            raise TypeError(
                f"{self.name}() takes {len(names)} positional arguments but {len(args)} were given"
            )
        bound = dict(zip(names, args, strict=False))
        for name in given:
            if name in bound:
                raise TypeError(f"{self.name}() got multiple values for argument {name!r}")
            if name not in (*names, *self.by_name, *self.records):
                raise TypeError(f"{self.name}() got an unexpected keyword argument {name!r}")
        bound |= given
        missing = [name for name in names if name not in bound]
        if missing:
            raise TypeError(f"{self.name}() needs the argument {missing[0]!r}")
        for name in {a.name for a in self.arguments if a.several} & bound.keys():
            bound[name] = several(self.name, name, bound[name])
        for argument in self.arguments:
            value = bound[argument.name]
            for each in value if argument.several else (value,):
                check_place(self.name, argument.name, each, argument.takes_tensors)
        return bound

    def ask(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The records of a call, out of records and of their fields.

        Raises:
            UsageError: a record and one of its fields, a field that this verb does not take, or a
                value that none can be.
            TypeError: a keyword that must be given is not.
        """
        asked = {name: self._record(name, given) for name in self.records}
        for keyword in self.keywords:
            value = getattr(asked[called(keyword.record)], keyword.name)
            keyword.check(value)
            if keyword.option is not None and keyword.option.path and value is not None:
                for each in value if keyword.several else (value,):
                    check_place(self.name, keyword.name, each, keyword.takes_tensors)
        return asked

    def _record(self, name: str, given: Mapping[str, Any]) -> Any:
        record = self.records[name]
        mine = [keyword.name for keyword in self.keywords if keyword.record is record]
        single = {
            field: several(self.name, field, given[field])
            if self.by_name[field].several and given[field] is not None
            else given[field]
            for field in mine
            if field in given
        }
        whole = given.get(name)
        if whole is None:
            for field in mine:
                if self.by_name[field].required and field not in single:
                    raise TypeError(f"{self.name}() needs the keyword argument {field!r}")
            return _plain(record(**single), self.by_name)
        if not isinstance(whole, record):
            raise TypeError(f"{self.name}() wants {name} to be a {record.__name__}, not {whole!r}")
        if single:
            raise UsageError(
                f"{name} already has {', '.join(single)}; give the record or its fields, not both"
            )
        for other in dataclasses.fields(record):
            if other.name not in mine and getattr(whole, other.name) != other.default:
                raise UsageError(f"{self.command} does not take {other.name} ({name})")
        return _plain(whole, self.by_name)

    def parameters(self) -> list[tuple[str, str, str]]:
        """(name, type, default) of all keywords of the function, as Python code; the default is ""
        where one must be given."""
        rows = [
            (k.name, k.annotation, "" if k.required else repr(k.default))
            for k in self.by_name.values()
        ]
        records = [(name, f"{r.__name__} | None", "None") for name, r in self.records.items()]
        return [*rows, *records]

    def signature(self, names: Mapping[str, Any]) -> inspect.Signature:
        """Of the public function. ``names`` are those that types are written by."""

        def parameter(name: str, kind: Any, written: str, default: Any) -> inspect.Parameter:
            hint = _evaluated(written, names)
            return _PARAMETER(name, kind, annotation=hint, default=default)

        either = _PARAMETER.POSITIONAL_OR_KEYWORD
        found = [parameter(a.name, either, a.type, _PARAMETER.empty) for a in self.arguments]
        defaults = {name: k.default for name, k in self.by_name.items()}
        for name, written, default in self.parameters():
            value = defaults.get(name) if default else _PARAMETER.empty
            found.append(parameter(name, _PARAMETER.KEYWORD_ONLY, written, value))
        return inspect.Signature(found, return_annotation=self.returns)

    def documented(self, text: str) -> str:
        """A docstring with the keywords at the end of its ``Args``."""
        body, mark, rest = _split(inspect.cleandoc(text), ("Returns:", "Raises:"))
        lines = [f"{k.name}: {k.option.text}" for k in self.by_name.values() if k.option]
        lines += [f"{name}: those of ``{r.__name__}`` in one" for name, r in self.records.items()]
        wrapped = "\n".join(_wrapped(line) for line in lines)
        head = "" if "\nArgs:\n" in body else "\n\nArgs:"
        return f"{body.rstrip()}{head}\n{wrapped}\n\n{mark}{rest}"


def _plain(record: Any, keywords: Mapping[str, Keyword]) -> Any:
    """The record with values as the verbs read them."""
    given = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    changed = {
        name: plain
        for name, value in given.items()
        if name in keywords and (plain := keywords[name].plain(value)) is not value
    }
    return dataclasses.replace(record, **changed) if changed else record


def _evaluated(written: str, names: Mapping[str, Any]) -> Any:
    def holder() -> None:
        """Carries one annotation."""

    holder.__annotations__ = {"value": written}
    return get_type_hints(holder, dict(names))["value"]


def _split(text: str, marks: Iterable[str]) -> tuple[str, str, str]:
    for mark in marks:
        body, found, rest = text.partition(f"\n{mark}")
        if found:
            return body, mark, rest
    return text, "", ""


def _wrapped(line: str) -> str:
    return textwrap.fill(
        " ".join(line.split()), 96, initial_indent="    ", subsequent_indent="        "
    )

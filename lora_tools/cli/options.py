"""click's parameters out of a verb's row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from lora_tools.cli.groups import GroupedOption
from lora_tools.options.fields import nearest
from lora_tools.options.tables import OUTPUT, RUNNING
from lora_tools.verbs.row import Argument, Keyword, Verb

REPORT, FIRST = "Report", "Most used"
WEIGHTED = "ADAPTER[=WEIGHT]..."


def parameters(verb: Verb) -> list[click.Parameter]:
    """Its arguments and options, each under its heading, with those that every command has."""
    arguments = [_argument(a) for a in verb.arguments if a.name != "out"]
    return [*arguments, *_options(verb)]


def _options(verb: Verb) -> Iterator[click.Option]:
    """Those that most people need first; then all others under their headings."""
    found = list(_under_headings(verb))
    order = ("out", *verb.first.split(), "as_json")
    first = {option.name: option for option in found if option.name in order}
    for name in order:
        if name in first:
            first[name].group = FIRST
            yield first[name]
    yield from (option for option in found if option.name not in order)


def _under_headings(verb: Verb) -> Iterator[GroupedOption]:
    common = {OUTPUT: [_out()] if verb.writes else [], RUNNING: _reporting()}
    for keyword in verb.keywords:
        if keyword.option is not None:
            yield from common.pop(keyword.option.group, ())
            yield _option(keyword)


def _argument(argument: Argument) -> click.Argument:
    if argument.several:
        return click.Argument(
            [argument.name],
            nargs=-1,
            required=argument.needed,
            metavar=WEIGHTED if argument.needed else f"[{WEIGHTED}]",
            type=click.Path(),
        )
    return click.Argument([argument.name], type=click.Path())


def _option(keyword: Keyword) -> GroupedOption:
    option, default = keyword.option, keyword.default
    assert option is not None
    flags = option.flags or (keyword.flag,)
    attributes: dict[str, Any] = {"help": option.text, "group": option.group}
    if keyword.type is bool:
        attributes |= {"is_flag": True, "default": default, "show_default": default is True}
        return GroupedOption([*flags, keyword.name], **attributes)
    attributes |= {
        "metavar": option.metavar,
        "multiple": keyword.several,
        "required": keyword.required,
        "type": _type(keyword),
    }
    if default is not None and not keyword.several and not keyword.required:
        attributes |= {"default": default, "show_default": True}
    return GroupedOption([*flags, keyword.name], **attributes)


class _Choice(click.Choice[Any]):
    """click's, with the name that was meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """As click has it, and that."""
        return f"{super().get_invalid_choice_message(value, ctx)} {nearest(value, self.choices)}"


def _type(keyword: Keyword) -> Any:
    if keyword.listed:
        return _Choice(keyword.choices)
    if keyword.option is not None and keyword.option.path:
        return click.Path()
    return keyword.type if keyword.type in (int, float) else str


def _out() -> GroupedOption:
    return GroupedOption(
        ["-o", "--out"],
        required=True,
        type=click.Path(),
        group=OUTPUT,
        help="Where to write, also at an address (s3://…, gs://…, az://…). It must not exist yet, "
        "and its parent folder must.",
    )


def _reporting() -> list[GroupedOption]:
    return [
        GroupedOption(
            ["--report", "report_file"],
            type=click.Path(dir_okay=False),
            group=REPORT,
            help="Write the report to this file as JSON (docs/report.md).",
        ),
        GroupedOption(
            ["--json", "as_json"],
            is_flag=True,
            group=REPORT,
            help="Print the report to stdout as JSON.",
        ),
        GroupedOption(
            ["-v", "--verbose"],
            is_flag=True,
            group=REPORT,
            help="List every module and the fate of every tensor.",
        ),
        GroupedOption(
            ["-q", "--quiet"], is_flag=True, group=REPORT, help="Print nothing but errors."
        ),
    ]

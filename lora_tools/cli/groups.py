"""click with options under headings, and commands in the order of the work."""

from __future__ import annotations

import os
from typing import Any

import click
from click.core import ParameterSource

from lora_tools.options.fields import nearest


def variable(command: str, flag: str) -> str:
    """The environment variable that sets a command's option, its own before that of all; "" where
    none does."""
    names = (f"LORATOOLS_{command}_{flag[2:]}", f"LORATOOLS_{flag[2:]}")
    return next(filter(os.environ.get, (n.replace("-", "_").upper() for n in names)), "")


class GroupedOption(click.Option):
    """An option that stands under a heading of its command's help, and that an environment variable
    can set: ``LORATOOLS_MERGE_JOBS`` for ``merge --jobs``, ``LORATOOLS_JOBS`` for that of all."""

    def __init__(self, *args: Any, group: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """As click has it, which knows one variable by the parameter's name."""
        return os.environ.get(self._variable(ctx)) or None

    def _variable(self, ctx: click.Context) -> str:
        """The variable that is set, the command's own before that of all; "" where none is."""
        long = next(flag for flag in self.opts if flag.startswith("--"))
        return variable(ctx.command.name or "", long)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """As click has it, with the variable where that was wrong."""
        hint = super().get_error_hint(ctx)
        if ctx is None or ctx.get_parameter_source(self.name or "") != ParameterSource.ENVIRONMENT:
            return hint
        return f"{hint} ({self._variable(ctx)})"


def headings(command: click.Command, ctx: click.Context) -> dict[str, list[click.Parameter]]:
    """A command's options by heading; --help stands under the last one."""
    result: dict[str, list[click.Parameter]] = {}
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option):
            last = next(reversed(result), "Options")
            result.setdefault(getattr(parameter, "group", last), []).append(parameter)
    return result


class GroupedCommand(click.Command):
    """Prints an example first, and its options under their headings.

    Attributes:
        example: a command line.
    """

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click has it. It compares options with their dashes, by which all are alike."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            wrong = error.option_name.lstrip("-")
            flags = [f for p in self.get_params(ctx) for f in p.opts if f.startswith("--")]
            meant = nearest(wrong, [flag[2:] for flag in flags]).replace("'", "'--", 1)
            message = f"No such option {error.option_name!r}. {meant}".rstrip()
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, then what the command does."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write(f"{'':{formatter.current_indent}}$ {self.example}\n")
        super().format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Replaces click's one long list."""
        groups = headings(self, ctx)
        rows = {
            name: [row for p in group if (row := p.get_help_record(ctx)) is not None]
            for name, group in groups.items()
        }
        # One width of the first column for all headings, so that the eye can run down it.
        widest = max((len(row[0]) for group in rows.values() for row in group), default=0)
        for name, group in rows.items():
            with formatter.section(name):
                formatter.write_dl([(left.ljust(min(widest, 30)), right) for left, right in group])


class OrderedGroup(click.Group):
    """Lists its commands in the order they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Not sorted: the main job first."""
        return list(self.commands)

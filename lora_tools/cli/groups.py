"""click with options under headings, and commands in the order of the work."""

from __future__ import annotations

from typing import Any

import click


class GroupedOption(click.Option):
    """An option that stands under a heading of its command's help."""

    def __init__(self, *args: Any, group: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def headings(command: click.Command, ctx: click.Context) -> dict[str, list[click.Parameter]]:
    """A command's options by heading; --help stands under the last one."""
    result: dict[str, list[click.Parameter]] = {}
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option):
            last = next(reversed(result), "Options")
            result.setdefault(getattr(parameter, "group", last), []).append(parameter)
    return result


class GroupedCommand(click.Command):
    """Prints its options under their headings."""

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

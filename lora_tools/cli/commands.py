"""One command for each row of the table of verbs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import click

from lora_tools.cli.groups import GroupedCommand
from lora_tools.cli.options import parameters
from lora_tools.cli.pages import page_of
from lora_tools.errors import QualityGateError
from lora_tools.verbs.row import Verb


class VerbCommand(GroupedCommand):
    """A verb as a command. Its options are made when they are asked for: some have tables to read,
    which a list of the commands can do without."""

    def __init__(self, verb: Verb) -> None:
        self._verb = verb
        self._params: list[click.Parameter] = []
        required = verb.usage or ("-o OUT" if verb.writes else "")
        super().__init__(
            verb.command,
            callback=self._run,
            help=inspect.cleandoc(verb.text),
            short_help=verb.short,
            epilog=page_of(verb.command),
            example=verb.example,
            options_metavar=f"{required} [OPTIONS]".strip(),
        )

    @property
    def params(self) -> list[click.Parameter]:
        """As click has it."""
        if not self._params:
            self._params = parameters(self._verb)
        return self._params

    @params.setter
    def params(self, given: list[click.Parameter]) -> None:
        """click sets none at first."""
        self._params = given

    def _run(
        self, report_file: str | None, as_json: bool, quiet: bool, verbose: bool, **given: Any
    ) -> None:
        """Run the verb under a progress bar, then print the report, for people and as JSON. A
        failed quality gate is reported like the rest, before it is an error."""
        from lora_tools.cli.progress import progress
        from lora_tools.cli.render import show
        from lora_tools.verbs.frame import carry_out
        from lora_tools.verbs.report_file import plain

        file = Path(report_file) if report_file is not None else None
        failure = None
        with progress(quiet) as bar:
            try:
                report = carry_out(self._verb, {**given, "progress": bar}, file)
            except QualityGateError as error:
                if error.report is None:
                    raise
                report, failure = error.report, error
        if as_json:
            click.echo(json.dumps(plain(report)))
        if not quiet:
            looked = not self._verb.writes or report.dry_run
            answer = looked and not as_json
            show(report, verbose=verbose, written=failure is None, answer=answer)
        if failure is not None:
            raise failure

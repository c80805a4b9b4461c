"""Parts of a command line: help under headings, and the type of ages. Not here: the commands (`cli`)."""

import re
from datetime import timedelta
from typing import Any

import click

from core.names import suggestion

SECTIONS = {
    "Compute": ("check", "plan", "run", "compute", "status", "ui"),
    "Understand": ("browse", "explain", "rejects", "study", "verify"),
    "Subsets": ("versions", "diff", "lineage", "evaluate", "reproduce", "export", "prune"),
}
"""Headings of the help, with their commands."""


class Sections(click.Group):
    """A group whose help lists the commands under headings, and that suggests the closest name of a command."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the headings, each with its commands."""
        del ctx
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=90)) for name in names])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for a misspelt name, suggest the closest ones."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}; {suggestion(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


class Age(click.ParamType):
    """A number of hours, days or weeks, such as 30d."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the time span of a text."""
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", str(value), re.ASCII)
        if found is None:
            self.fail(
                f"{value!r} is not an age. Remedy: a number from 1 to 99999 and h, d or w, such as 30d", param, ctx
            )
        return int(found[1]) * {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}[found[2]]

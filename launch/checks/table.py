"""Findings for people: a table, and the line to paste."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.checks.finding import Finding, Level, nodes_of

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
LOG_WIDTH = 110  # of a file, which has none


def render(findings: Sequence[Finding]) -> RenderableType:
    """Return the table of ``findings``, a count of each level, and the nodes to exclude."""
    table = Table(box=None, pad_edge=False, show_header=True, padding=(0, 2, 0, 0))
    table.add_column("level", no_wrap=True)
    table.add_column("topic", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        body = Text(finding.what)
        if finding.level != "ok":
            body.append(f"\nwhy: {finding.why}\nremedy: {finding.remedy}", style="dim")
        table.add_row(Text(finding.level, STYLES[finding.level]), finding.topic, body)
    lines = [Text(""), Text(count(findings))]
    advices: dict[Level, str] = {"error": "do without", "warning": "slow, perhaps do without"}
    named: set[str] = set()
    for level, advice in advices.items():
        nodes = ",".join(node for node in nodes_of(findings, level) if node not in named)
        named.update(nodes_of(findings, level))
        if nodes:
            lines.append(Text(f"{advice}: sbatch --exclude={nodes}, or cluster.exclude={nodes}"))
    return Group(table, *lines)


def count(findings: Sequence[Finding]) -> str:
    """Return ``12 ok, 1 warning, 0 errors``."""
    numbers = {level: sum(f.level == level for f in findings) for level in STYLES}
    words = [f"{numbers['ok']} ok"]
    words += [f"{n} {w}{'' if n == 1 else 's'}" for w, n in numbers.items() if w != "ok"]
    return ", ".join(words)


def show(findings: Sequence[Finding]) -> None:
    """Print the table to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(render(findings), markup=False)

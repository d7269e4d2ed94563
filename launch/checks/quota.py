"""What the user may still write, where a command tells."""

from __future__ import annotations

import getpass
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from launch.checks.command import ask
from launch.checks.finding import Finding, error, ok, warning

TOPIC = "files"
NEARLY_FULL = 0.9  # of a quota
KIB = 1024


@dataclass(frozen=True)
class QuotaFacts:
    """One limit, in bytes and files; 0 is none.

    Attributes:
        source: the command that told.
        place: file system.
        used_bytes, limit_bytes: the limit is the hard one, or the soft one where there is no hard.
        used_files, limit_files: likewise.
        text: the command's own words, where they are of no known form.
    """

    source: str
    place: str = ""
    used_bytes: int = 0
    limit_bytes: int = 0
    used_files: int = 0
    limit_files: int = 0
    text: str = ""


def gather(folder: Path) -> list[QuotaFacts]:
    """Ask ``quota``, Lustre and the NCHC's own command, those that are installed."""
    found = []
    if shutil.which("quota"):
        found += parse_table("quota", ask(["quota", "-w", "-p"]).text)
    if shutil.which("lfs"):
        answer = ask(["lfs", "quota", "-u", getpass.getuser(), str(folder)])
        found += parse_table("lfs quota", answer.text)
    if shutil.which("hfsquota"):
        answer = ask(["hfsquota"])
        found += [QuotaFacts("hfsquota", text=answer.text.strip())] if answer.is_good else []
    return found


def parse_table(source: str, text: str) -> list[QuotaFacts]:
    """Read rows of ``FILESYSTEM kbytes quota limit grace files quota limit grace``.

    ``quota -w -p`` and ``lfs quota`` print these columns; a star marks a quota that is exceeded.
    """
    rows = []
    for line in text.splitlines():
        cells = [cell.rstrip("*") for cell in line.split()]
        if len(cells) < 8 or not re.fullmatch(r"\d+", cells[1]):
            continue
        numbers = [int(cells[index]) for index in (1, 2, 3, 5, 6, 7)]
        used, soft, hard, files, soft_files, hard_files = numbers
        rows.append(
            QuotaFacts(
                source, cells[0], used * KIB, (hard or soft) * KIB, files, hard_files or soft_files
            )
        )
    return rows


def judge(quotas: list[QuotaFacts], profile_gb: float | None) -> list[Finding]:
    """Judge how much of every quota is left."""
    if not quotas:
        told = f"; the profile says {profile_gb:g} GB" if profile_gb else ""
        return [ok(TOPIC, f"no command here tells a quota{told}")]
    return [_judge_one(facts) for facts in quotas]


def _judge_one(facts: QuotaFacts) -> Finding:
    if facts.text:
        return ok(TOPIC, f"{facts.source}: {' | '.join(facts.text.splitlines())}")
    what = (
        f"{facts.source} {facts.place}: {facts.used_bytes / 1e9:.1f} of "
        f"{_limit(facts.limit_bytes, 1e9)} GB, {facts.used_files} of "
        f"{_limit(facts.limit_files, 1)} files"
    )
    shares = [
        used / limit
        for used, limit in (
            (facts.used_bytes, facts.limit_bytes),
            (facts.used_files, facts.limit_files),
        )
        if limit
    ]
    remedy = "delete old checkpoints and stores, or write to a file system with more room"
    if any(share >= 1 for share in shares):
        return error(TOPIC, what, "the quota is used up: nothing more can be written", remedy)
    if any(share >= NEARLY_FULL for share in shares):
        return warning(TOPIC, what, "the next checkpoint may not fit", remedy)
    return ok(TOPIC, what)


def _limit(value: int, unit: float) -> str:
    return f"{value / unit:.10g}" if value else "unlimited"

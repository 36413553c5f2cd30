"""Tables and figures of what was run, made from its files alone, and put where the page names them.

A part's module makes its own tables: `tables(found)` gives them by name, from the replicates of each task. The page has
a place for each, between two comments; what stands there is replaced.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.parts import PARTS
from benchmarks.sequence.plan import Plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sequences-of-runs.md"


def read(out: Path, *, quick: bool) -> dict[str, Replicates]:
    """What was run, by part and task."""
    found: dict[str, Replicates] = defaultdict(lambda: defaultdict(list))
    for path in sorted(out.glob("*.json")):
        unit = json.loads(path.read_text())
        if unit["quick"] == quick:
            found[unit["part"]][unit["task"]].append(unit)
    for tasks in found.values():
        for units in tasks.values():
            units.sort(key=lambda unit: int(unit["seed"]))
    return found


def write(plan: Plan, out: Path) -> None:
    """Make all tables and figures of the results in a folder; those of a full run go into the page, too."""
    tables: dict[str, str] = {"provenance": provenance(found := read(out, quick=plan.quick))}
    for part, tasks in found.items():
        tables |= {f"{part}: {name}": table for name, table in PARTS[part].tables(tasks).items()}
        for name, figure in PARTS[part].figures(tasks).items():
            figure.savefig(out / f"{part}-{name}.png", dpi=120)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items())
    (out / "tables.md").write_text(text + "\n")
    if not plan.quick and PAGE.exists():
        PAGE.write_text(inserted(PAGE.read_text(), tables))


def inserted(page: str, tables: dict[str, str]) -> str:
    """The page with its tables replaced by these; one that is not there any more is left as it is."""

    def replaced(place: re.Match[str]) -> str:
        table = tables.get(place["name"])
        return place[0] if table is None else f"<!-- {place['name']} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>[^>]*?) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)


def provenance(found: dict[str, Replicates]) -> str:
    """How many replicates of what, at which commits, in how much time."""
    rows = [
        [
            part,
            task,
            str(len(units)),
            ", ".join(sorted({unit["commit"] for unit in units})),
            f"{sum(unit['seconds'] for unit in units) / 60:.1f}",
        ]
        for part, tasks in found.items()
        for task, units in tasks.items()
    ]
    total = sum(unit["seconds"] for tasks in found.values() for units in tasks.values() for unit in units)
    return table(["part", "task", "replicates", "commit", "minutes"], rows) + f"\n\nTogether {total / 60:.0f} minutes."

"""What mkdocs asks for while it builds: the committed results as tables, and links of included files."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
MARK = "<!-- results -->"
MOST_ROWS = 60
# Files that a page includes have links for readers of the repository.
LINKS = {
    "varify/ARCHITECTURE.md": "architecture.md",
    "tests/zoo/README.md": "zoo.md",
    "CHANGELOG.md": "changelog.md",
}


def on_page_markdown(markdown, **_):
    """The page with results in the place of the mark."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, "\n\n".join(section(path) for path in sorted(RESULTS.glob("*.json"))))


def section(path):
    """A heading, the command, and one table for all figures of a file."""
    found = json.loads(path.read_text())
    rows = list(flat(found))
    settings = {key: value for key, value in rows if not isinstance(value, dict)}
    tables = {key: value for key, value in rows if isinstance(value, dict)}
    columns = list(dict.fromkeys(column for row in tables.values() for column in row))
    module = f"`python -m tests.benchmarks.{path.stem}`" if (RESULTS.parent / f"{path.stem}.py").exists() else ""
    lines = [f"### {path.stem}", "", module, "", "; ".join(f"{key}: {shown(value)}" for key, value in settings.items())]
    if len(columns) > 12:  # one row for each figure reads better than a table wider than a screen
        tables = {f"{key}, {c}": {"": row[c]} for key, row in tables.items() for c in columns if c in row}
        columns = [""]
    lines += ["", f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)] if tables else []
    for key, row in list(tables.items())[:MOST_ROWS]:
        lines.append(f"| {key} | {' | '.join(shown(row.get(column, '')) for column in columns)} |")
    if len(tables) > MOST_ROWS:
        lines += ["", f"The first {MOST_ROWS} of {len(tables)} rows; the others are in `{path.relative_to(ROOT)}`."]
    return "\n".join(lines)


def flat(found, name=""):
    """Pairs of a name and a value, or of a name and a row of values; nested names are joined by commas."""
    if isinstance(found, list):  # rows
        found = {str(i + 1): row for i, row in enumerate(found)}
    leaves = {key: value for key, value in found.items() if not nested(value)}
    if name and leaves:
        yield name, leaves
    elif leaves:
        yield from leaves.items()
    for key, value in found.items():
        if nested(value):
            yield from flat(value, f"{name}, {key}".lstrip(", "))


def nested(value):
    """Whether a value has rows of its own."""
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value))


def shown(value):
    """A number with three digits, a list as its entries, else the text."""
    if isinstance(value, list):
        return ", ".join(shown(entry) for entry in value)
    text = (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
    return re.sub(r"[|\n]", " ", text)

"""What mkdocs asks for while it builds: the committed results of benchmarks as tables, and formulas as MathML."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
MARK = "<!-- results -->"
MOST_ROWS, MOST_COLUMNS = 60, 10
ABOUT = ("machine", "date", "torch", "varify", "threads", "seconds", "settings", "recipe")  # of the run, no figures


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page with the results in the place of the mark."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, "\n\n".join(section(path) for path in sorted(RESULTS.glob("*.json"))))


FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """The page with its formulas as every browser shows them by itself: nothing is loaded from elsewhere."""
    return FORMULA.sub(
        lambda found: mathml(html.unescape(found[2]), "block" if found[1] == "div" else "inline"), content
    )


def mathml(formula: str, display: str) -> str:
    """Of LaTeX."""
    from latex2mathml.converter import convert

    return str(convert(formula, display=display))


def section(path: Path) -> str:
    """A heading, the command, what is known of the run, and a table of the figures of a file."""
    found = json.loads(path.read_text())
    about = dict.fromkeys(f"{key} {shown(value)}" for key, value in facts(found))
    rows = {name: row for name, row in figures(found, "") if row}
    about |= dict.fromkeys(f"{key} {shown(value)}" for key, value in rows.pop("", {}).items())
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if len(columns) > MOST_COLUMNS:  # a figure a row reads better than a table wider than the screen
        rows = {f"{name}, {column}".lstrip(", "): {"": row[column]} for name, row in rows.items() for column in row}
        columns = [""]
    lines = [f"### {path.stem}", "", f"`python -m tests.benchmarks.{path.stem}`; {'; '.join(about)}", ""]
    lines += [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for name, row in list(rows.items())[:MOST_ROWS]:
        lines.append(f"| {name} | {' | '.join(shown(row.get(column, '')) for column in columns)} |")
    if len(rows) > MOST_ROWS:
        lines += ["", f"These are {MOST_ROWS} of {len(rows)} rows; all are in `{path.relative_to(ROOT)}`."]
    return "\n".join(lines)


def facts(found: Any) -> Iterator[tuple[str, Any]]:
    """What a file says of its runs, wherever it stands."""
    for key, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, dict):
            yield from facts(value)
        elif key in ABOUT and key != "seconds":
            yield key, value[:10] if key == "date" else value


def figures(found: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows by name. What a row has of single repetitions, a list of dicts, is left to the file."""
    if isinstance(found, list):
        found = {str(i): value for i, value in enumerate(found, 1)}
    found = {key: value for key, value in found.items() if key not in ABOUT}
    row = {key: value for key, value in found.items() if not nested(value)}
    yield name, row
    for key, value in found.items():
        if nested(value) and not (row and isinstance(value, list)):
            yield from figures(value, f"{name}, {key}".lstrip(", "))


def nested(value: Any) -> bool:
    """Whether a value has rows of its own; a mean with its error is one figure."""
    if isinstance(value, dict):
        return not {"mean", "error"} <= set(value)
    return isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)


def shown(value: Any) -> str:
    """A number with three digits, a list as its entries, a mean with its standard error, else the text."""
    if isinstance(value, dict):
        return f"{shown(value['mean'])} ± {value['error']:.2g}"
    if isinstance(value, list):
        return ", ".join(shown(entry) for entry in value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", " ").replace("\n", " ")

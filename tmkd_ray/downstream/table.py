"""The one table of a downstream task, as Markdown, CSV and JSON."""

import csv
import io
import json
from dataclasses import dataclass, field
from typing import Any

from tmkd_ray import storage

Value = str | int | float | None


@dataclass
class TransferTable:
    """What a student was measured at, beside its baselines.

    Attributes:
        rows: by column; all rows have the same columns. None: there is no such figure.
        percent: columns that hold parts of one, shown in percent in the Markdown.
        notes: for the reader.
        details: more figures, for the JSON alone; plain values.
    """

    task: str
    rows: list[dict[str, Value]]
    percent: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the table for people."""
        columns = list(self.rows[0])
        lines = [
            "| " + " | ".join(f"{name} %" if name in self.percent else name for name in columns) + " |",
            "|" + "|".join("---" if isinstance(self.rows[0][name], str) else "---:" for name in columns) + "|",
        ]
        for row in self.rows:
            lines.append("| " + " | ".join(self._shown(name, row[name]) for name in columns) + " |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def _shown(self, column: str, value: Value) -> str:
        if value is None:
            return "–"
        if column in self.percent:
            assert isinstance(value, int | float)
            return f"{100 * value:.2f}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return f"{value:g}" if isinstance(value, float) else str(value)

    def csv(self) -> str:
        """Return the table with a line of column names; parts of one stay parts of one."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def save(self, folder: str) -> None:
        """Write `results.md`, `results.csv` and `results.json` into a folder or URI."""
        content = {"task": self.task, "rows": self.rows, "notes": self.notes, **self.details}
        texts = {
            "results.md": self.markdown(),
            "results.csv": self.csv(),
            "results.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        }
        for name, text in texts.items():
            storage.write_bytes(storage.join(folder, name), text.encode())

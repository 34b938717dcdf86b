"""The model of `fastcpt/cost.py` beside published training speeds: nothing is measured here."""

import csv
from pathlib import Path

from fastcpt.published import ROWS, summary

COLUMNS = ["source", "model", "device", "gpus", "seq_len", "recomputed", "published", "predicted", "error", "used_for"]


def table() -> list[dict[str, str]]:
    """A line for each published row: tokens/s a GPU, and the prediction's relative error."""
    return [
        {
            "source": row.source, "model": row.model, "device": row.device, "gpus": str(row.job.processes),
            "seq_len": str(row.job.seq_len), "recomputed": f"{row.job.recompute:g}", "published": f"{row.rate:.0f}",
            "predicted": f"{row.rate * (1 + row.error):.0f}", "error": f"{row.error:+.3f}",
            "used_for": "fit" if row.fit else "test",
        }
        for row in ROWS
    ]  # fmt: skip


def main(output: Path | None = None) -> None:
    """Prints the table; writes output/predictions.csv."""
    rows = table()
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS}
    for row in [dict(zip(COLUMNS, COLUMNS)), *rows]:
        print("  ".join(row[name].ljust(widths[name]) for name in COLUMNS).rstrip())
    print(summary())
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "predictions.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"written: {output / 'predictions.csv'}")

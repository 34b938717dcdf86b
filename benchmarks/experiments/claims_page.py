"""The page of the papers' claims, of the committed table alone.

python benchmarks/experiments/claims_page.py            writes docs/claims.md
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims import Check, Claim, Judge, bounds

from fastcpt.results import Results

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "benchmarks" / "results" / "experiments.csv"
RESUME = ROOT / "benchmarks" / "results" / "experiments_resume.json"
PAGE = ROOT / "docs" / "claims.md"


def resume(measured: dict[str, Any]) -> Claim:
    """R6, of resume.py's file: no seeds, equality of bits."""
    exact, others = measured["exact"], measured["others"]
    checks = [
        Check(f"stopped and resumed: {what} are the same bits", [], equal) for what, equal in exact.items()
    ] + [Check(f"{what}: other weights", [], entry["differs"]) for what, entry in others.items()]  # fmt: skip
    notes = [f"final L_A: uninterrupted {measured['loss']:.4f}"]
    notes += [
        f"final L_A, {what}: {entry['loss']:.4f} ({entry['loss'] - measured['loss']:+.4f})"
        for what, entry in others.items()
    ]
    return Claim(
        "R6", "Only an exact resume is a resume",
        "Resuming must restore the rate and its decay, Adam's moments and the data position (inferred from 2308.04014's third finding)",
        checks, notes,
    )  # fmt: skip


def page(claims: Sequence[Claim], about: str) -> str:
    """Markdown."""
    lines = ["# The papers' claims, on a small model", "", about, ""]
    lines += ["| claim | | verdict |", "|---|---|---|"]
    lines += [
        f"| [{claim.id}](#{claim.id.lower()}) | {claim.title} | {claim.verdict if claim.checks else 'reported'} |"
        for claim in claims
    ]
    words = {True: "holds", False: "**fails**", None: "undecided"}
    for claim in claims:
        lines += ["", f'<a id="{claim.id.lower()}"></a>', "", f"## {claim.id}: {claim.title}", ""]
        lines += [f"The papers: {claim.paper}.", ""]
        if claim.checks:
            lines += [
                f"**{claim.verdict[0].upper()}{claim.verdict[1:]}.**",
                "",
                "| check | mean [95% interval] | by seed | |",
                "|---|---|---|---|",
            ]
        for check in claim.checks:
            values = ", ".join(f"{value:+.4f}" for value in check.values)
            lines.append(f"| {check.what} | {bounds(check.values)} | {values} | {words[check.holds]} |")
        lines += ["", *(f"- {note}" for note in claim.notes)]
    return "\n".join(lines) + "\n"


ABOUT = """Models of 81,312 parameters over bytes learn the documentation of Linux and Perl (A, 33 MB) and continue on that of
Python (B, a weak shift) or on Chinese manuals (C, a strong one): `benchmarks/experiments/grid.yaml` has every arm,
`corpus.py` beside it makes the text, `claims.py` judges and says how. Bases had 40 tokens a parameter, R5's 302; every arm ran
on three independent bases, each with a data order of its own. All numbers come from `benchmarks/results/experiments.csv`,
losses are nats a byte. A small model shows signs and orders, not the papers' sizes."""


def render() -> str:
    judge = Judge(Results.read(TABLE))
    measured = json.loads(RESUME.read_text())
    return page(
        [
            judge.r1(),
            judge.r2(),
            judge.r3(),
            judge.r4(),
            judge.r5(),
            resume(measured),
            judge.r7(),
            judge.r8(),
            judge.r9(),
            judge.r10(),
        ],
        ABOUT,
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)

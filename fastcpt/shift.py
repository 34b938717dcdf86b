"""How far new text is from old: weak or strong, a proxy from the losses of the model before its first step.

The shift is how much worse the model does on the new text than on the old, in nats a token of the old:

    upstream loss * (downstream bits per byte / upstream bits per byte - 1)

Per byte, because a tokenizer cuts a foreign language into more and easier tokens. It is held against what 300B tokens
without replay made the 405M model of arXiv 2403.08763 forget: 0.27 nats after a weak shift, the Pile to SlimPajama, and
1.39 after a strong one, to German. The nearer of the two, as ratios go, names it.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastcpt import UserError
from fastcpt.config import Config
from fastcpt.evaluation import NamedSet, evaluate_checkpoint
from fastcpt.lineage import Origin

WEAK, STRONG = 0.27, 1.39  # nats of forgetting, table of arXiv 2403.08763
REPLAY = {"weak": 0.05, "strong": 0.25}  # its advice
TOKENS = 65_536  # of each set, enough for a shift: it asks for tenths of nats

Results = dict[str, dict[str, Any]]  # of `evaluation.evaluate`, by name of the set


@dataclass(frozen=True)
class Shift:
    """nats: see above. told_by: where the losses are from."""

    nats: float
    told_by: str

    @property
    def kind(self) -> str:
        return "strong" if self.nats > math.sqrt(WEAK * STRONG) else "weak"

    @property
    def text(self) -> str:
        return (
            f"the new text's shift is {self.kind} by a proxy, {self.nats:+.2f} nats a token before the first step ({self.told_by}; "
            f"the anchors are {WEAK} and {STRONG})"
        )


def of(results: Results, told_by: str) -> Shift | None:
    """The shift between the means of the roles, each set counting the same; None where a role was not measured."""
    roles = {
        role: [entry for entry in results.values() if entry["role"] == role] for role in ("upstream", "downstream")
    }
    if not all(roles.values()):
        return None
    loss = _mean(entry["loss"] for entry in roles["upstream"])
    old, new = (_mean(entry["bits_per_byte"] for entry in entries) for entries in roles.values())
    return Shift(loss * (new / old - 1), told_by)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def known(origin: Origin, validation: Sequence[NamedSet]) -> Shift | None:
    """From the last evaluation that the start's own run made of the same sets, by content, up to its checkpoint."""
    if origin.state is None or origin.path is None or "data" not in origin.state:
        return None
    names = {print_: name for name, print_ in origin.state["data"]["fingerprints"]["val"].items()}
    results: Results = {}
    try:
        lines = (origin.path.parent.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for line in map(json.loads, (line for line in lines if '"eval"' in line)):
            if line["step"] <= origin.state["step"]:
                found = [(each, line["eval"].get(names.get(each.shards.fingerprint))) for each in validation]
                results = {each.name: {**entry, "role": each.role} for each, entry in found if entry}
        return of(results, "the last evaluation of the start's own run")
    except (OSError, ValueError, KeyError):  # not there, or not as we write it: not known
        return None


def measured(config: Config, origin: Origin) -> Shift:
    """On TOKENS tokens of each validation set. Raises UserError when there is nothing to compare."""
    roles = {entry.name: entry.role for entry in config.data.val}
    if origin.path is None or not {"upstream", "downstream"} <= set(roles.values()):
        what = "data.val lacks one of the roles"
        if origin.path is None:
            what = "a run from scratch has no old text" if origin.kind == "scratch" else "the start is not there"
        raise UserError(
            "shift-unmeasurable",
            f"--shift compares the start's losses on upstream and downstream sets, and {what}; leave it out",
        )
    paths = {entry.name: entry.path for entry in config.data.val if entry.role in ("upstream", "downstream")}
    results = evaluate_checkpoint(
        str(origin.path), paths, config.data.seq_len, min(TOKENS, config.run.eval_tokens), config.train.micro_batch or 1
    )
    told_by = f"measured on {min(TOKENS, config.run.eval_tokens):,} tokens of each set"
    found = of({name: {**entry, "role": roles[name]} for name, entry in results.items()}, told_by)
    assert found is not None
    return found

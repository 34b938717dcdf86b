"""What the papers advise about the schedule of a run: sentences that name their source, and the YAML that follows them.

`plan` and `train` print it; nothing is changed, and nothing refused.
"""

import math
from typing import Any

from fastcpt import checkpoint
from fastcpt.config import Config
from fastcpt.lineage import Origin
from fastcpt.schedules import STAGED, Plan


def fresh_moments(config: Config, origin: Origin) -> bool:
    return not origin.keeps_position and config.init.optimizer == "reset"


def schedule(config: Config, origin: Origin, plan: Plan) -> list[str]:
    """Pieces of advice, each a sentence, a line feed, and what to write in the configuration."""
    ending = plan.part(plan.last)
    found = [_end(ending, plan.highest), _stable(config, ending)]
    if fresh_moments(config, origin) and plan.warmup == 0:
        spike = "schedule.warmup is 0 and Adam starts afresh: expect a spike of the loss (arXiv 2308.04014)"
        found.insert(0, f"{spike}\nschedule: {{warmup: 0.01}}")
    if origin.kind == "continue" and origin.state is not None and "plan" in origin.state:
        found += [_annealed(origin), _repeated(plan, origin.state)]
    return [text for text in found if text]


def _end(plan: Plan, highest: float) -> str:
    """Re-warmed models were good after their decay alone (arXiv 2308.04014, its second takeaway)."""
    last = plan.rate(plan.last)
    if last <= 0.2 * highest:
        return ""
    if plan.kind == "constant":
        mend = "kind: wsd"
    elif plan.kind in STAGED and plan.decay == 0:
        mend = f"decay: {STAGED[plan.kind][3]}"
    else:  # the clipped cosine does not come to its end after a long warm-up
        mend = "min_lr_ratio: 0.1" if plan.min_lr_ratio > 0.2 else "kind: cosine"
    decay = "a model for use wants a decay, here or in a branch (arXiv 2308.04014)"
    return f"the rate ends at {last:.2e}, above a fifth of its peak: {decay}\nschedule: {{{mend}}}"


def _constant(plan: Plan) -> tuple[int, int]:
    """The steps after which the constant rate of a schedule of STAGED begins and its decay begins."""
    return plan.warmup_end + plan.cooldown, plan.first + plan.length - plan.decay


def _stable(config: Config, plan: Plan) -> str:
    """Whether a checkpoint of the constant rate will be there when the run has ended."""
    run, last = config.run, plan.last
    if plan.kind not in STAGED or plan.decay == 0:
        return ""
    begin, end = _constant(plan)
    begin = max(begin, plan.first + 1)
    every = math.lcm(run.save_every, run.keep_every)  # 0 where none is kept for good
    if begin > end or (every and end // every * every >= begin):
        return ""
    step = end // run.save_every * run.save_every
    if step < begin:
        mend = f"save_every: {end}, keep_every: {end}"
    elif (last - 1) // run.save_every - step // run.save_every + 1 < run.keep:
        return ""
    else:
        mend = f"keep_every: {step}"
    why = "later text starts best from one that has not decayed (arXiv 2403.08763, 2505.07796)"
    return f"no checkpoint of the constant rate will be left at the end: {why}\nrun: {{{mend}}}"


def _annealed(origin: Origin) -> str:
    """Whether the run starts in the decay of another that still has a checkpoint of its constant rate."""
    assert origin.state is not None and origin.path is not None
    step = origin.state["step"]
    plan = Plan(**origin.state["plan"]).part(step)
    if plan.kind not in STAGED:
        return ""
    begin, end = _constant(plan)
    stable = [known for known in checkpoint.steps(origin.path.parent.parent) if begin <= known <= end]
    if step <= end or not stable:
        return ""
    better = "less decayed ones adapt better (arXiv 2505.07796), and arXiv 2403.08763 changes data at the constant rate"
    where = origin.path.parent / f"step-{max(stable)}"
    return f"step {step:,} of {origin.path.parent} has decayed: {better}\ninit: {{from: {where}}}"


def _repeated(plan: Plan, before: dict[str, Any]) -> str:
    """Whether this is a third run in a row, or a later one, and re-warms and decays as the one before did."""
    continued = before["config"]["init"]["from"] != "scratch" and not before["config"]["init"]["branch"]
    if not continued or plan.peak <= before["lr"] or {plan.kind, before["plan"]["kind"]} & {*STAGED, "constant"}:
        return ""
    return (
        "the model was re-warmed and decayed before: re-warming makes it forget, and over several stages infinite schedules "
        "did better than repeated cosines (arXiv 2503.02844)\nschedule: {kind: infinite}"
    )

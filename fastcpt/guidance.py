"""What the papers advise about a run: sentences that name their source, and the YAML that follows them.

`plan` and `train` print it, by one function, `advice`; nothing is changed, and nothing refused. What a run should know
while it goes on is in `alarms.py`.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastcpt import checkpoint, lineage, metrics, pretraining, shift, spending
from fastcpt.config import Config
from fastcpt.data import Mixture
from fastcpt.evaluation import NamedSet
from fastcpt.lineage import Origin
from fastcpt.progress import short_count
from fastcpt.schedules import ASCII, BLOCKS, STAGED, Plan, curve
from fastcpt.shards import tokenizer_fingerprint
from fastcpt.shift import REPLAY, Shift

Priority = Literal["new", "balanced", "old"]
# Of the peak of pre-training. The smallest rate of arXiv 2308.04014 was a tenth, its pre-training's end.
PARTS: dict[str, tuple[float, ...]] = {"new": (1.0,), "balanced": (0.5,), "old": (0.25, 0.1)}
SIZES = ("layers", "width", "heads", "mlp_width", "vocab_size")
NEOX_IDS = range(50254, 50278)  # ids of Pythia's tokenizer, without and with its added tokens


@dataclass(frozen=True)
class Asked:
    """What a user wants to be advised on. priority: the new text or the old; budget: tokens that there may be compute
    for; measured: the shift of the new text, where it was."""

    priority: Priority | None = None
    budget: int | None = None
    measured: Shift | None = None


class Start(Protocol):
    """What `plan.Prepared` and `state.State` have in common."""

    @property
    def config(self) -> Config: ...
    @property
    def origin(self) -> Origin: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def mixture(self) -> Mixture: ...
    @property
    def validation(self) -> list[NamedSet]: ...


def advice(start: Start, asked: Asked = Asked()) -> list[str]:
    """Pieces of advice, each a sentence, a line feed, and what to write in the configuration. A run that goes on was told."""
    config, origin, plan = start.config, start.origin, start.plan
    if origin.kind == "resume":
        return []
    told = asked.measured or shift.known(origin, start.validation)
    found = [
        *_evaluated(start), _random_start(start), _replay(start, told), *schedule(config, origin, plan),
        _large(start), *_epochs(start), _priority(start, asked.priority), _budget(start, asked.budget),
    ]  # fmt: skip
    return [text for text in found if text]


def after_start(start: Start, results: shift.Results) -> list[str]:
    """What the first evaluation adds: the shift, and the replay that it asks for where `advice` could not tell."""
    if start.origin.kind == "scratch" or shift.known(start.origin, start.validation):
        return []
    told = shift.of(results, "the first evaluation")
    return [text for text in (_replay(start, told) if told else "",) if text]


def glyphs() -> str:
    """What a curve is drawn with on this terminal."""
    return BLOCKS if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII


def number(value: float) -> str:
    """As YAML reads it: PyYAML takes 3e-05 for text."""
    text = f"{value:.3g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _seen(start: Start) -> bool:
    """Whether the model knows all the text that it is to be trained on."""
    known = lineage.history_of(start.origin)["seen"]
    return all(start.mixture.sets[source.name].fingerprint in known for source in start.config.data.train)


def _evaluated(start: Start) -> list[str]:
    """Both losses are wanted, from the first step on."""
    data, roles = start.config.data, {entry.role for entry in start.config.data.val}
    if start.origin.kind == "scratch":
        return [] if roles else ["nothing is evaluated: data.val is empty"]
    found = []
    for role, what in (("upstream", "forgetting"), ("downstream", "adaptation")):
        if role not in roles:
            path = next((source.path for source in data.train if bool(source.replay) == (role == "upstream")), "SHARDS")
            entry = f"- {{name: {role}, path: {path}-val, role: {role}}}"
            found.append(
                f"{what} is not measured: no set of data.val has role: {role} (arXiv 2403.08763); in data.val:\n{entry}"
            )
    return found


def _replay(start: Start, told: Shift | None) -> str:
    """Weights are relative to the sum of those there are; the compute stays the same, replayed tokens are not added."""
    data, train = start.config.data, start.config.train
    if start.origin.kind == "scratch" or _seen(start) or all(source.replay for source in data.train):
        return ""
    weights = {source.name: source.weight or 0.0 for source in data.train}
    if data.phases:  # which may have their own: shares of all that the run reads
        weights = {use.name: use.share for use in _uses(start)}
    old, new = (
        sum(weights.get(each.name, 0) for each in data.train if bool(each.replay) is replay) for replay in (True, False)
    )
    share = old / (old + new)
    if share > 0 and (told is None or told.kind == "weak" or share >= REPLAY["strong"] - 1e-9):
        return ""
    source = next((source for source in data.train if source.replay), None)
    upstream = [(entry.name, entry.path.removesuffix("-val")) for entry in data.val if entry.role == "upstream"]
    if source is None and not upstream:
        return ""
    name, path = (source.name, source.path) if source else upstream[0]
    how = "in_order" if source and source.replay == "in_order" else "true"
    part = REPLAY[told.kind if told else "weak"]
    own = weights.get(source.name, 0) if source else 0
    weak, strong = (new * each / (1 - each) - old + own for each in REPLAY.values())
    what = f"{share:.1%} of the samples replay upstream text" if source else "no source replays upstream text"
    if told:
        head = f"{what}, and {told.text}: replay {part:.0%} (arXiv 2403.08763)"
        weight = strong if told.kind == "strong" else weak
    else:
        head = (
            f"{what}: 5% of it is enough against a weak shift, 25% against a strong one (arXiv 2403.08763), a weight of "
            f"{weak:.3g} or {strong:.3g}; the first evaluation tells which, or fastcpt plan --shift"
        )
        weight = weak
    replayed = short_count(round(part * train.tokens))
    where = ", the weight beside those of each of data.phases where they sum to 1" if data.phases else ""
    return (
        f"{head}; of {short_count(train.tokens)} tokens {replayed} are then old text, in the same compute; in data.train{where}:\n"
        f"- {{name: {name}, path: {path}, weight: {number(weight)}, replay: {how}}}"
    )


def _random_start(start: Start) -> str:
    """Whether there is a model to start from: of the same sizes, for the same ids, that has not seen all of the text."""
    if start.origin.kind != "scratch":
        return ""
    first = next(iter(start.mixture.sets.values()))
    beside, name = _beside(start), pretraining.same_sizes(start.origin)
    if beside:
        where, what = str(beside), "this tokenizer"
    elif name and first.vocab_size in NEOX_IDS:
        where, what = f"EleutherAI/{name}", "as many ids, if the text was prepared with its tokenizer"
    else:
        return ""
    return (
        f"the weights are random, and {where} has these sizes and {what}: a pre-trained start was better on both texts, as "
        f"far as they were alike (arXiv 2308.04014)\ninit: {{from: {where}}}"
    )


def _beside(start: Start) -> Path | None:
    """The run in the same folder as this one's that could be its start, the one with the most tokens."""
    folder = Path(start.config.run.output).resolve()
    own = {shards.fingerprint for shards in start.mixture.sets.values()}
    ids = next(iter(start.mixture.sets.values())).manifest["tokenizer"]["fingerprint"]
    found: list[tuple[int, Path]] = []
    for run in sorted(path.parent for path in folder.parent.glob("*/checkpoints")):
        try:
            last = run / "checkpoints" / f"step-{checkpoint.steps(run)[-1]}"
            state = json.loads((last / checkpoint.STATE).read_bytes())
            sizes = {size: getattr(start.origin.arch, size) for size in SIZES}
            alike = sizes == {size: state["architecture"][size] for size in SIZES}
            alike &= tokenizer_fingerprint((last / "tokenizer.json").read_bytes()) == ids
            if alike and run != folder and not own <= set(state["history"]["seen"]):
                found.append((state["tokens"], run))
        except (OSError, ValueError, KeyError, TypeError, IndexError):  # no run, or one that is just being written
            continue
    return max(found)[1] if found else None


def _large(start: Start) -> str:
    parameters = metrics.parameter_count(start.origin.arch)
    if start.origin.kind not in ("pretrained", "continue") or parameters < 2.5e9 or start.plan.highest < 3e-4:
        return ""
    return (
        f"a peak of {start.plan.highest:.2e} for {parameters / 1e9:.1f}B parameters: continued at 3e-4 a model of 3B was harmed, at "
        "3e-5 it was not; one of 1.1B bore 3e-4 (arXiv 2406.14833)\noptim: {lr: 3.0e-05}"
    )


def _uses(start: Start) -> list[spending.Use]:
    config, state = start.config, start.origin.state
    before = state["data"]["samples"] if start.origin.keeps_position and state else 0
    return spending.uses(start.mixture, before, start.plan.steps * config.train.batch_tokens // config.data.seq_len)


def _epochs(start: Start) -> list[str]:
    few, many = "up to about 4 epochs cost little", "beyond 4 epochs it is worth little; take more text or less weight"
    found = []
    for low, high, what in ((1, 4, few), (4, math.inf, many)):
        repeated = ", ".join(f"{use.name} {use.epochs:.2f} times" for use in _uses(start) if low < use.epochs <= high)
        if repeated:
            found.append(f"repeated text: {repeated}; {what} (Muennighoff et al. 2023, arXiv 2305.16264)")
    return found


def _priority(start: Start, priority: Priority | None) -> str:
    """The peak that suits what matters more: the new text, or what the model knows."""
    if priority is None:
        return ""
    origin, known = start.origin, pretraining.of(start.origin, start.plan)
    if origin.kind not in ("pretrained", "continue"):
        return f"--priority is of a run that re-warms a model; {origin.kind} does not (arXiv 2308.04014)"
    parts = " to ".join(f"{part:g}" for part in PARTS[priority])
    head = f"--priority {priority} is {parts} times the peak of pre-training"
    why = "larger rates learned the new text better and forgot more of the old (arXiv 2308.04014); see both losses"
    if known.peak is None:
        return f"{head}, which is not known of {start.config.init.from_}: look it up, and multiply; {why}"
    rates = " to ".join(f"{part * known.peak:.3g}" for part in PARTS[priority])
    lr = number(PARTS[priority][0] * known.peak)
    return f"{head}: {rates}, as it was {known.text}; {why}\noptim: {{lr: {lr}}}"


def _budget(start: Start, budget: int | None) -> str:
    """A schedule that is cut off has not decayed."""
    plan, batch = start.plan, start.config.train.batch_tokens
    if budget is None:
        return ""
    part = budget / (plan.steps * batch)
    if part >= 1:
        return f"--budget {short_count(budget)} is enough for all of the run's {short_count(plan.steps * batch)} tokens"
    rate = plan.rate(plan.first + max(1, budget // batch))
    unsafe = (
        "do not rank rates before the end: for the first 100B of 240B tokens the smallest rate led on the new text, and "
        "ended behind (arXiv 2308.04014, figure 2), and of schedules as short as the budget the paper tells nothing"
    )
    early = "; if it must be able to end anywhere, take a smaller rate and a longer warm-up" if part < 0.45 else ""
    return (
        f"--budget {short_count(budget)} ends at {part:.0%} of the schedule, at a rate of {rate:.2e}: give the schedule that "
        f"length, and it comes to its end{early}; {unsafe}\ntrain: {{tokens: {budget}}}"
    )


def preview(origin: Origin, plan: Plan, step: int) -> list[str]:
    """The learning rate before the start: in words, as a curve, and now; where a run goes on, beside that of the save."""
    following, last = min(step + 1, plan.last), plan.last
    now = f"{plan.rate(following):.3g} at step {following:,}"
    if origin.keeps_position and origin.state is not None:
        saved = origin.state["lr"]
        now += f" (at the save of step {origin.state['step']:,} it was {saved:.3g})"
        if origin.kind == "resume" and not math.isclose(saved, plan.rate(origin.state["step"]), rel_tol=1e-9):
            now += f": ANOTHER RATE than this version's schedule has there, {plan.rate(origin.state['step']):.6g}"
    (bar,) = curve(plan, 40, 1, glyphs())
    return [
        f"learning rate, {', then '.join(part.kind for part in plan.parts)}: {plan.describe()}; {now}",
        f"learning rate of steps {plan.first + 1:,} to {last:,}: |{bar}|",
    ]


def schedule(config: Config, origin: Origin, plan: Plan) -> list[str]:
    """Pieces of advice, each a sentence, a line feed, and what to write in the configuration."""
    ending = plan.part(plan.last)
    found = [_end(ending, plan.highest), _stable(config, ending)]
    if pretraining.fresh_moments(config, origin) and plan.warmup == 0:
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

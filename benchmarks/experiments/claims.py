"""The claims of the papers, judged by the experiments' table; claims_page.py writes docs/claims.md of it.

Arms are those of grid.yaml; names of sets: a upstream, b weak shift, c strong shift. Losses are nats a token, a token is a
byte. The thresholds were fixed before the runs. A check of a sign holds if it has that sign with every seed and its mean is
over twice its standard error, and fails if the opposite does so; one of equality holds if the 90% interval lies within
+-delta, and fails if the 95% interval lies outside. Anything else is undecided. A claim is reproduced if all its checks
hold, not reproduced if one fails.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastcpt.results import Results, above, equivalent, interval

DELTA = 0.005  # of R1
ONE = "ab-reset-0.01"  # warm-up 1%, the base's peak rate, Adam reset, no replay
RATES = {"0.5 x": "rate-half", "1 x": ONE, "2 x": "rate-two"}
REPLAY = ("0.5%", "1%", "5%", "10%", "25%", "50%")
EARLY = 160  # the step at 20% of an arm of 800
SWITCHES = (800, 1600)  # steps: of R9's three thirds
WINDOW = (360, 510)  # steps: 12% to 17% of R5's schedule of 3,000


@dataclass(frozen=True)
class Check:
    """What must hold, the values by seed, and whether it does; None: undecided."""

    what: str
    values: Sequence[float]
    holds: bool | None


@dataclass(frozen=True)
class Claim:
    """paper: what it found; notes: what is reported beside the checks."""

    id: str
    title: str
    paper: str
    checks: list[Check]
    notes: list[str]

    @property
    def verdict(self) -> str:
        outcomes = [check.holds for check in self.checks]
        return "not reproduced" if False in outcomes else "undecided at this size" if None in outcomes else "reproduced"


def positive(what: str, values: Sequence[float]) -> Check:
    """A paired difference that must be above 0."""
    holds = True if above(values) else False if above([-value for value in values]) else None
    return Check(f"{what} > 0", values, holds)


def same(what: str, values: Sequence[float], delta: float) -> Check:
    """A paired difference that must be 0 within delta."""
    found = interval(values)
    outside = found.low > delta or found.high < -delta
    return Check(
        f"{what} = 0 within {delta:g}", values, True if equivalent(values, delta) else False if outside else None
    )


def at_least(what: str, values: Sequence[float], bound: float) -> Check:
    """A value that must not be below a bound."""
    beyond = positive(what, [value - bound for value in values])
    return Check(f"{what} > {bound:g}", values, beyond.holds)


class Judge:
    """The table, and differences between arms by seed."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def by_seed(self, value: Callable[[str, int], float], *arms: str) -> list[list[float]]:
        """For each seed that all the arms have, the value of each arm."""
        return [[value(arm, seed) for arm in arms] for seed in self.results.seeds(*arms)]

    def difference(self, high: str, low: str, value: Callable[[str, int], float]) -> list[float]:
        return [first - second for first, second in self.by_seed(value, high, low)]

    def final(self, name: str) -> Callable[[str, int], float]:
        return lambda arm, seed: self.results.final(arm, seed, name)

    def average(self, *names: str) -> Callable[[str, int], float]:
        return lambda arm, seed: sum(self.results.final(arm, seed, name) for name in names) / len(names)

    def at(self, name: str, step: int) -> Callable[[str, int], float]:
        return lambda arm, seed: self.results.within(arm, seed, name, step, step)

    def peak(self, name: str) -> Callable[[str, int], float]:
        return lambda arm, seed: self.results.peak(arm, seed, name)

    def start(self, name: str) -> Callable[[str, int], float]:
        return lambda arm, seed: self.results.curve(arm, seed, name)[0].loss

    def mean(self, arm: str, value: Callable[[str, int], float]) -> float:
        values = [value(arm, seed) for seed in self.results.seeds(arm)]
        return sum(values) / len(values)

    def ordered(self, what: str, arms: dict[str, str], value: Callable[[str, int], float]) -> list[Check]:
        """Each arm above the one before it."""
        pairs = zip(list(arms.items()), list(arms.items())[1:])
        return [
            positive(f"{what}: {high_name} - {low_name}", self.difference(high, low, value))
            for (low_name, low), (high_name, high) in pairs
        ]

    def row(self, what: str, arms: dict[str, str], value: Callable[[str, int], float]) -> str:
        """Means over the seeds, for the notes."""
        return f"{what}: " + ", ".join(f"{name} {self.mean(arm, value):.4f}" for name, arm in arms.items())

    def r1(self) -> Claim:
        checks = []
        for adam in ("reset", "keep"):
            for name in ("a", "b"):
                for warmup in ("0", "0.005", "0.02"):
                    values = self.difference(f"ab-{adam}-{warmup}", f"ab-{adam}-0.01", self.final(name))
                    percent = f"{float(warmup):.1%} - 1%"
                    checks.append(same(f"final L_{name.upper()}, Adam {adam}: warm-up {percent}", values, DELTA))
            peaks = self.difference(f"spike-{adam}-0", f"spike-{adam}-0.02", self.peak("a"))
            checks.append(positive(f"peak of L_A over its start, Adam {adam}: warm-up 0% - 2%", peaks))
        spikes = [
            self.row(f"peak of L_A over its start, Adam {adam}", {w: f"spike-{adam}-{w}" for w in ("0", "0.005", "0.01", "0.02")}, self.peak("a"))
            for adam in ("reset", "keep")
        ]  # fmt: skip
        return Claim(
            "R1", "The length of the warm-up does not matter in the end",
            "0, 0.5, 1 and 2% of warm-up end alike after 50B tokens; none at all has a spike without later consequence "
            "(2308.04014, Figure 1; 2403.08763)", checks, spikes,
        )  # fmt: skip

    def r2(self) -> Claim:
        checks = self.ordered("final L_A", RATES, self.final("a"))
        for name, arm in RATES.items():
            early = self.difference(arm, "const", self.at("a", EARLY))
            checks.append(positive(f"L_A at 20%: {name} - constant 0.1 x", early))
        half = self.difference("rate-half", ONE, self.final("b"))
        checks.append(Check("final L_B: 0.5 x - 1 x, not below 0", half, not above([-value for value in half])))
        every = {"constant 0.1 x": "const", **RATES}
        return Claim(
            "R2", "A higher peak learns more and forgets more",
            "Larger peak rates end lower downstream and higher upstream; the constant rate forgets least early (2308.04014, "
            "Figures 2 and 3); downstream, 1 x and 2 x ended 0.007 apart in the authors' second run", checks,
            [self.row("final L_A", every, self.final("a")), self.row("final L_B", every, self.final("b"))],
        )  # fmt: skip

    def r3(self) -> Claim:
        every = {"constant 0.1 x": "const", **RATES}
        checks = self.ordered("L_B at 20% of the run", every, self.at("b", EARLY))
        for name, arm in RATES.items():
            checks.append(positive(f"final L_B: constant - {name}", self.difference("const", arm, self.final("b"))))
        short = {"constant 0.1 x": "short-const", "0.5 x": "short-half", "1 x": "short-one", "2 x": "short-two"}
        return Claim(
            "R3", "A run that is cut off ranks the rates the other way round",
            "The constant rate leads downstream for the first 45% (134B of 299B tokens), and is last in the end (the authors' "
            "second run). What a schedule rescaled to the short budget does, no paper says", checks,
            [self.row("L_B at 20%, cut off", every, self.at("b", EARLY)), self.row("final L_B", every, self.final("b")),
             self.row("final L_B of the schedule rescaled to 20%", short, self.final("b")),
             self.row("final L_A of the schedule rescaled to 20%", short, self.final("a"))],
        )  # fmt: skip

    def r4(self) -> Claim:
        checks = [
            positive(
                f"final L_{name.upper()}: scratch - pre-trained", self.difference("scratch", ONE, self.final(name))
            )
            for name in ("a", "b")
        ]
        early, late = (self.difference("scratch", ONE, value) for value in (self.at("b", EARLY), self.final("b")))
        checks.append(
            positive("the gap in L_B: at 20% - at the end", [first - last for first, last in zip(early, late)])
        )
        const = self.difference("scratch", "const", self.final("b"))
        return Claim(
            "R4", "A pre-trained start wins", "All warmed models beat training from scratch on both texts; scratch passes the "
            "constant rate downstream after about 200B tokens (2308.04014, Figures 2, 3 and 9)", checks,
            [f"final L_B: scratch - constant 0.1 x = {sum(const) / len(const):+.4f}"],
        )  # fmt: skip

    def r5(self) -> Claim:
        checks, notes = [], []
        for adam in ("reset", "keep"):
            arms = {"constant 0.1 x": f"same-const-{adam}", **{
                name: f"same-{adam}-{label}" for name, label in (("0.5 x", "half"), ("1 x", "one"), ("2 x", "two"))
            }}  # fmt: skip

            def window(arm: str, seed: int) -> float:
                begun = self.results.curve(arm, seed, "a")[0].step  # a branch counts on
                return self.results.within(arm, seed, "a", begun + WINDOW[0], begun + WINDOW[1])

            checks += self.ordered(f"L_A at 12-17%, Adam {adam}", arms, window)
            checks += self.ordered(f"peak of L_A over its start, Adam {adam}", arms, self.peak("a"))
            notes += [self.row(f"L_A at 12-17%, Adam {adam}", {"exact resume": "same-resume", **arms}, window)]
        checks.append(
            positive(
                "peak of L_A, 1 x: new text - same text", self.difference("long-weak", "same-reset-one", self.peak("a"))
            )
        )
        return Claim(
            "R5", "Re-warming on the same text raises the loss", "Pile on Pile: the loss rises by 0.1 (3e-4) and 0.2 (6e-4), the "
            "constant rate is best, and nothing is recovered within 50B of 297B or 411B tokens (2308.04014, Figure 5; 0.35 and 0.45 on "
            "new text: 2403.08763). Judged where the papers looked, at 12-17% of the schedule", checks, notes,
        )  # fmt: skip

    def r7(self) -> Claim:
        checks, notes, forgotten, needed = [], [], {}, {}
        for shift, name, none in (("weak", "b", ONE), ("strong", "c", "strong-0%")):
            arms = {"0%": none, **{ratio: f"{shift}-{ratio}" for ratio in REPLAY}}
            forgotten[shift] = self.difference(none, "control", self.final("a"))
            checks += self._replay(shift, name, arms, forgotten[shift])
            notes += [
                self.row(f"final L_{each.upper()}, {shift} shift", arms, self.final(each)) for each in ("a", name)
            ]
            union = self.mean(f"union-{shift}", self.average("a", name))
            means = [self.mean(arm, self.average("a", name)) for arm in arms.values()]
            needed[shift] = next((i for i, value in enumerate(means) if value <= union + 0.02), len(arms))
            enough = (*arms, "more than 50%")[needed[shift]]
            notes.append(
                f"mean of both losses, {shift} shift: within 0.02 of the union's {union:.4f} with {enough} of replay"
            )
        stronger = [strong - weak for strong, weak in zip(forgotten["strong"], forgotten["weak"])]
        checks.append(positive("forgetting against the equal-token control: strong - weak", stronger))
        more = needed["strong"] - needed["weak"]
        checks.append(
            Check("ratios of replay until the union is reached: strong - weak, not below 0", [more], more >= 0)
        )
        return Claim(
            "R7", "A little replay removes most of the forgetting",
            "1% of replay removes 67% of a weak shift's forgetting, 5% 78%, at a cost of at most 0.01 downstream; a strong shift "
            "forgets 1.39 and not 0.27, and wants 25% (2403.08763). Small models need more", checks, notes,
        )  # fmt: skip

    def _replay(self, shift: str, name: str, arms: dict[str, str], forgotten: Sequence[float]) -> list[Check]:
        """What replay does to L_A, and costs of the loss of set `name`. forgotten: without it, by seed."""
        from scipy import stats

        table = self.by_seed(self.final("a"), *arms.values())
        p = float(stats.page_trend_test([[-value for value in row] for row in table]).pvalue)
        falls = [row[0] - row[-1] for row in table]
        checks = [Check(f"L_A falls with replay, {shift} shift (Page's test, p = {p:.1g}): 0% - 50%", falls, p < 0.05)]
        for ratio, bound in (("5%", 0.15), ("25%", 0.5)):
            gains = self.difference(arms["0%"], arms[ratio], self.final("a"))
            parts = [gain / lost for gain, lost in zip(gains, forgotten)]
            checks.append(
                at_least(f"share of the forgetting that {ratio} of replay removes, {shift} shift", parts, bound)
            )
        gains = self.difference(arms["0%"], arms["5%"], self.final("a"))
        costs = self.difference(arms["5%"], arms["0%"], self.final(name))
        left = [0.25 * gain - cost for gain, cost in zip(gains, costs)]
        checks.append(positive(f"5% of replay, {shift} shift: a quarter of L_A's gain - L_{name.upper()}'s loss", left))
        return checks

    def r8(self) -> Claim:
        gap = [
            five - union
            for (five,), (union,) in zip(
                *(self.by_seed(self.average("a", "b"), arm) for arm in ("weak-5%", "union-weak"))
            )
        ]
        return Claim(
            "R8", "Continuing with replay comes near to training on both from scratch",
            "0.02 between the mean of both losses with 5% of replay and of the union (405M, weak shift; 2403.08763)", [],
            [f"mean of both losses: 5% of replay - union = {bounds(gap)}; reported, not judged"],
        )  # fmt: skip

    def bump(self, arm: str, seed: int) -> float:
        """How far L_A rises in the 200 steps after a switch above what it was there; mean of both switches."""
        rises = []
        for switch in SWITCHES:
            near = [p.loss for p in self.results.curve(arm, seed, "a") if switch <= p.step <= switch + 200]
            rises.append(max(near) - near[0])
        return sum(rises) / len(rises)

    def r9(self) -> Claim:
        checks = [
            same(f"final L_A: infinite - {name}", self.difference("three-infinite", arm, self.final("a")), 2 * DELTA)
            for name, arm in (("three cosines", "three-cosines"), ("one cosine", "three-one"))
        ]
        checks.append(
            positive(
                "rise of L_A after the switches: three cosines - infinite",
                self.difference("three-cosines", "three-infinite", self.bump),
            )
        )
        for switch in SWITCHES:
            values = self.difference("three-infinite", "three-cosines", self.at("a", switch))
            checks.append(positive(f"L_A at step {switch:,}: infinite, not annealed - three cosines", values))
            pairs = zip(
                self.by_seed(self.at("a", switch), "three-infinite"), self.by_seed(self.final("a"), f"anneal-{switch}")
            )
            values = [before - after for (before,), (after,) in pairs]
            checks.append(
                positive(f"L_A at step {switch:,}: infinite, before - after annealing over 112 steps", values)
            )
        every = {"three cosines": "three-cosines", "infinite": "three-infinite", "one cosine": "three-one"}

        def between(arm: str, seed: int) -> float:
            return self.results.within(arm, seed, "a", SWITCHES[0] + 1, SWITCHES[0] + 400)

        return Claim(
            "R9", "An infinite schedule needs no re-warming",
            "Without a shift, cosines that are restarted and infinite schedules end alike (405M, 3 x 100B tokens; 2403.08763, Figure 10); "
            "re-warming itself makes a model forget (2503.02844)", checks,
            [self.row("rise of L_A after the switches", every, self.bump), self.row("L_A in the 400 steps after the first switch", every, between),
             self.row("final L_A", every, self.final("a"))],
        )  # fmt: skip

    def r10(self) -> Claim:
        starts = {"100%": ONE, "19%": "early-19%", "7%": "early-7%"}
        checks = [
            check for name in ("a", "b") for check in self.ordered(f"final L_{name.upper()}", starts, self.final(name))
        ]
        return Claim(
            "R10", "The latest checkpoint is the best start", "Of iterations 10k, 27k and 143k the last is best on both texts "
            "(2308.04014, Figures 7 and 8)", checks,
            [self.row(f"final L_{name.upper()}", starts, self.final(name)) for name in ("a", "b")],
        )  # fmt: skip


def bounds(values: Sequence[float]) -> str:
    """The mean and its 95% interval."""
    if not values:
        return ""
    found = interval(values)
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]" if len(values) > 1 else f"{found.mean:+g}"

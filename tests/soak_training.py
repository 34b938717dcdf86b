"""`kill -9` of one or both of two ranks, or of the only one, at a random moment, most of them in a save, time and again;
then the run goes on to its end: its weights, moments, data position and metrics must be, bit by bit, those of a run that
was never disturbed."""

import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

UNIT = 5  # kills of a trial
SECONDS = 180
LAYOUTS = {"ddp": 2, "fsdp": 2, "single": 1}  # how many ranks
START_SECONDS, SAVE_SECONDS = 1.0, 0.08  # in which a run starts and makes some steps; about as long as a save takes


def prepare(folder: Path, seed: int) -> Path:
    import stops

    return stops.prepare(folder)


def kill(randomness: random.Random, ranks: Any, start_seconds: float, save_seconds: float) -> str:
    """Kills some ranks at a random moment. Whether a save was under way in one of them, or it was too late."""
    import stops

    victims = randomness.choice([[0], [1], [0, 1]] if ranks.size == 2 else [[0]])
    saves, into = randomness.choice([None, 1, 1, 2, 3]), randomness.uniform(0, 1)
    assert stops.until(lambda: bool(ranks.pids()) or ranks.ended(), 60), ranks.log.read_text()[-3000:]
    if saves is None:
        time.sleep(into * start_seconds)
    else:  # the first look at the save of that number, and a little more
        stops.until(lambda: ranks.saves(victims[0]) >= 2 * saves - 1 or ranks.ended(), 60)
        time.sleep(into * save_seconds)
    pids = ranks.pids()
    if not pids or ranks.ended():
        return "too late"
    for victim in victims:
        ranks.kill(pids[victim])
    ranks.forget()
    return "in a save" if any(ranks.saves(victim) % 2 for victim in victims) else "outside a save"


def trial(randomness: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    import stops

    number = int(folder.name.rpartition("-")[2])
    layout, size = list(LAYOUTS.items())[number % len(LAYOUTS)]
    tally: Counter[str] = Counter()
    while tally["kills"] < UNIT:
        shutil.rmtree(folder / "run", ignore_errors=True)
        stops.place_of(prepared, folder, layout, save_every=randomness.choice([1, 1, 2]))
        while tally["kills"] < UNIT:
            ranks = stops.Ranks(folder, {}, size=size)
            outcome = kill(randomness, ranks, START_SECONDS, SAVE_SECONDS)
            ranks.wait(grace=randomness.choice([0.0, 2.0]))  # what is left ends by itself, or is ended as well
            tally[outcome] += 1
            if outcome == "too late":
                break
            tally += Counter({"kills": 1, f"of {layout}": 1})
        stops.goes_on(prepared, folder, layout, size)
        tally["same"] += 1
    return tally

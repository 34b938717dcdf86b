"""One of two ranks stops, sleeps, fails, leaves, is killed or reads damaged data at a random place: the run ends in bounded time, the rank is
the first thing that the log names, no process is left, and the run that goes on is the run that was never disturbed."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from soak_signals import prepare

__all__ = ["prepare"]

UNIT = 1
SECONDS = 180
KINDS = ["STOP", "sleep", "raise", "exit", "KILL", "damage"]
TIMEOUT, LONG = (
    3.0,
    15.0,
)  # of the configuration; five times as long for saving, and for what is done for the first time


def trial(randomness: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    import stops

    stops.place_of(prepared, folder)
    number = int(folder.name.rpartition("-")[2])
    what, torchrun = KINDS[number % len(KINDS)], number // len(KINDS) % 4 == 3
    where = randomness.choice(["step", "backward", "evaluation", "save"])
    first, last = {"step": (2, 11), "backward": (4, 24), "evaluation": (3, 12), "save": (1, 2)}[where]
    rank = randomness.randrange(2)
    fault: dict[str, Any] = {"rank": rank, "what": what, "where": where, "when": randomness.randint(first, last)}
    ranks = stops.Ranks(folder, fault, torchrun=torchrun)
    limit = (LONG if where == "save" else TIMEOUT) + 10
    codes = ranks.wait(120, grace=30 if torchrun else 2)
    log = ranks.log.read_text()
    import time

    acted = float((folder / "acted").read_text())
    seconds = time.time() - acted
    assert all(code != 0 for index, code in enumerate(codes) if torchrun or index != rank), f"{codes}: {log[-3000:]}"
    # torchrun itself gives a stopped process 30 s after SIGTERM, whatever --shutdown-timeout says, when another failed.
    assert seconds < limit + (33 if torchrun else 2), f"{fault}: it took {seconds:.1f} s: {log[-3000:]}"
    said = [line for line in log.splitlines() if line.startswith("fastcpt: ")]
    told = "shard-00000.bin" if what == "damage" else f"rank {rank} ("  # damaged data: which file is what matters
    assert said and told in said[0], f"{fault}: {codes}: {log[-3000:]}"
    assert f"rank {1 - rank} (" not in said[0], f"{fault}: {said}"
    if what in ("STOP", "sleep"):
        assert (folder / "run" / f"stacks-rank{1 - rank}.txt").read_text().count("most recent call first") >= 2
    if what == "damage":
        assert torchrun or codes == [2, 2], f"{codes}: {said}"
    if what == "sleep":
        assert "stops.py" in said[0] and "in act" in log, said
    assert stops.until(lambda: not ranks.left_over(), 5), f"left over: {ranks.left_over()}"
    stops.goes_on(prepared, folder)
    tally = Counter({"hangs": 1, what: 1, f"in {where}": 1, "named": 1, "none left over": 1, "same": 1})
    return tally + Counter({"torchrun": 1} if torchrun else {})

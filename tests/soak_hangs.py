"""One of two or four ranks stops, sleeps, fails, leaves, is killed or reads damaged data at a random place: the run ends in
bounded time, the rank is the first thing that the log names, no process is left, and the run that goes on is the run that
was never disturbed."""

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from soak_signals import prepare

__all__ = ["prepare"]

UNIT = 1
SECONDS = 180
KINDS = ["STOP", "sleep", "raise", "exit", "KILL", "damage"]
WAYS = [(2, False), (4, False), (2, True), (4, True)]  # how many ranks, and whether torchrun starts them
TIMEOUT, LONG = 3.0, 15.0  # of the configuration; five times as long for saving, and for all that is done first


def trial(randomness: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    import stops

    number = int(folder.name.rpartition("-")[2])
    what, (size, torchrun) = KINDS[number % len(KINDS)], WAYS[number // len(KINDS) % len(WAYS)]
    stops.place_of(prepared, folder, size=size)
    where = randomness.choice(["step", "backward", "evaluation", "save"])
    of_two = {"step": (2, 11), "backward": (4, 24), "evaluation": (3, 12), "save": (1, 2)}
    first, last = of_two[where] if size == 2 or where in ("step", "save") else (2, of_two[where][1] // 2)
    rank = randomness.randrange(size)
    fault: dict[str, Any] = {"rank": rank, "what": what, "where": where, "when": randomness.randint(first, last)}
    ranks = stops.Ranks(folder, fault, torchrun=torchrun, size=size)
    limit = (LONG if where == "save" else TIMEOUT) + 10
    codes = ranks.wait(120)
    log = ranks.log.read_text()
    seconds = time.time() - float((folder / "acted").read_text())
    assert all(code != 0 for index, code in enumerate(codes) if torchrun or index != rank), f"{codes}: {log[-3000:]}"
    assert seconds < limit, f"{fault}: it took {seconds:.1f} s: {log[-3000:]}"
    said = [line for line in log.splitlines() if line.startswith("fastcpt: ")]
    told = "shard-00000.bin" if what == "damage" else f"rank {rank} ("  # damaged data: which file is what matters
    assert said and told in said[0], f"{fault}: {codes}: {log[-3000:]}"
    others = [other for other in range(size) if other != rank]
    assert not any(f"rank {other} (" in said[0] for other in others), f"{fault}: {said}"
    if what in ("STOP", "sleep"):
        stacks = (folder / "run").glob("stacks-rank*.txt")
        assert any(path.read_text().count("most recent call first") >= 2 for path in stacks)
    if what == "damage":
        assert torchrun or codes == [2] * size, f"{codes}: {said}"
    if what == "sleep":
        assert "stops.py" in said[0] and "in act" in log, said
    assert stops.until(lambda: not ranks.left_over(), 5), f"left over: {ranks.left_over()}"
    stops.goes_on(prepared, folder, size=size)
    tally = Counter({"hangs": 1, what: 1, f"in {where}": 1, "named": 1, "none left over": 1, "same": 1})
    tally[f"seconds after {what}"] = round(seconds)
    return tally + Counter({f"of {size} ranks": 1, "torchrun": int(torchrun)})

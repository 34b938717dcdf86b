"""SIGTERM and SIGUSR1, to one of two ranks or to torchrun, at a random moment: saved within a step, nothing is lost, and
the run that goes on is the run that was never stopped. In some trials a second signal or SIGKILL comes during the save."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

UNIT = 1
SECONDS = 120
KINDS = [(what, target) for target in ("self", "parent") for what in ("TERM", "USR1")]


def prepare(folder: Path, seed: int) -> Path:
    import stops

    return stops.prepare(folder)


def trial(randomness: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    import stops

    stops.place_of(prepared, folder)
    number = int(folder.name.rpartition("-")[2])
    what, target = KINDS[number % len(KINDS)]
    where = randomness.choice(["step", "backward", "evaluation", "save"])
    last = {"step": 9, "backward": 20, "evaluation": 8, "save": 1}[where]
    fault: dict[str, Any] = {"rank": randomness.randrange(2), "what": what, "target": target, "where": where}
    fault["when"] = randomness.randint(1, last if target == "self" else max(1, last // 2))
    fault["in_save"] = randomness.choice([None, None, what, "KILL"])
    fault["slow"] = 0.0 if target == "self" else 0.25
    ranks = stops.Ranks(folder, fault, torchrun=target == "parent")
    codes = ranks.wait()
    log = ranks.log.read_text()
    tally = Counter({"signals": 1, f"{what} to {'torchrun' if target == 'parent' else 'a rank'}": 1, f"in {where}": 1})
    seen = stops.until(lambda: not ranks.left_over(), 10)
    assert seen, f"left over: {ranks.left_over()}"
    if fault["in_save"] == "KILL":
        stops.goes_on(prepared, folder)
        return tally + Counter({"killed in the save": 1, "same": 1})
    received = [int(path.read_text()) for path in folder.glob("received-*")]
    saved = re.search(r"preempted at step (\d+), saved in [\d.]+ s", log)
    assert saved, f"{json.dumps(fault)}: {codes}: {log[-3000:]}"
    step = int(saved[1])
    assert codes == [75, 75] if target == "self" else codes[0] != 0, f"{codes}: {log[-3000:]}"
    assert (folder / "run" / "exit-code").read_text() == "75\n"
    assert step <= min(received) + 1, f"the signal came in step {min(received)}, saved was step {step}"
    went_on = stops.goes_on(prepared, folder)
    assert went_on == step, f"saved at step {step}, went on from step {went_on}"
    tally += Counter({"saved within a step": 1, "same": 1})
    return tally + Counter({"a second signal in the save": 1} if fault["in_save"] else {})

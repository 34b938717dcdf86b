"""Under `torchrun --max-restarts 2` a rank raises an exception, then one or both are killed at a random moment: torchrun
starts them anew, they go on from the newest checkpoint, and the run ends as one that was never disturbed."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from soak_training import kill, prepare

__all__ = ["prepare"]

UNIT = 1  # kills of a trial, beside its exception
SECONDS = 180
START_SECONDS, SAVE_SECONDS = 3.0, 0.03


def trial(randomness: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    import stops

    number = int(folder.name.rpartition("-")[2])
    layout = ("ddp", "fsdp")[number % 2]
    stops.place_of(prepared, folder, layout, save_every=1)
    where = randomness.choice(["step", "backward", "evaluation", "save"])
    fault: dict[str, Any] = {"rank": randomness.randrange(2), "what": "raise", "where": where}
    fault |= {"when": randomness.randint(1, 4), "slow": 0.1}
    ranks = stops.Ranks(folder, fault, torchrun=True, restarts=2)
    assert stops.until((folder / "acted").exists, 60), ranks.log.read_text()[-3000:]
    ranks.forget()
    outcome = kill(randomness, ranks, START_SECONDS, SAVE_SECONDS)
    codes = ranks.wait(120)
    assert codes == [0], f"{codes}: {ranks.log.read_text()[-5000:]}"
    assert "ZeroDivisionError: of the test" in ranks.log.read_text()
    stops.check_outcome(prepared, folder, layout)
    assert stops.until(lambda: not ranks.left_over(), 5), f"left over: {ranks.left_over()}"
    tally = Counter({"kills": int(outcome != "too late"), outcome: 1})
    return tally + Counter({"same": 1, "exceptions": 1, f"of {layout}": 1})

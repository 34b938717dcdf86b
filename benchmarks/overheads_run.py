"""`fastcpt train` with clocks around its parts, run as a script by `bench_overheads.py`:

    python overheads_run.py STARTED FILE TRAIN-ARGUMENT...

STARTED: time.time() when the command was given. FILE: {name: [[seconds since then, seconds that it took], ...]} of each
call, in JSON. It imports what `fastcpt train` does, in the same order.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def main(started: float, file: Path, arguments: list[str]) -> int:
    zero = time.perf_counter() - (time.time() - started)
    spans: dict[str, list[tuple[float, float]]] = {}

    def clock(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                spans.setdefault(name, []).append((start - zero, time.perf_counter() - start))

        return timed

    def imports() -> Any:
        from fastcpt import train

        return train

    spans["interpreter"] = [(0.0, time.perf_counter() - zero)]
    train = clock("imports", imports)()
    from fastcpt import optim
    from fastcpt.model import GPTNeoX

    for owner, attribute, name in (
        (train, "parse", "configuration"), (train, "setup", "setup"), (train.metrics, "open_loggers", "loggers"),
        (train, "evaluate", "evaluation"), (train, "save", "snapshot"), (train, "train_step", "step"),
        (GPTNeoX, "__call__", "forward"), (train.Tensor, "backward", "backward"), (optim.AdamW, "step", "update"),
        (optim.AdamW, "_squared", "norm"), (optim, "square_by_products", "norm"),
    ):  # fmt: skip
        setattr(owner, attribute, clock(name, getattr(owner, attribute)))
    read = train.batches

    def batches(*args: Any, **keywords: Any) -> Iterator[Any]:
        inner = read(*args, **keywords)
        following, end = clock("data", lambda: next(inner, end)), object()
        while (windows := following()) is not end:
            yield windows

    train.batches = batches
    code: int = train.main(arguments)
    file.write_text(json.dumps(spans))
    return code


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if not entry.rstrip("/").endswith("benchmarks")]
    sys.exit(main(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))

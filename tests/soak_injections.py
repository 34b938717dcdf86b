"""NaN, infinities and spikes in a tensor of one micro-batch of one of two ranks, time and again in a run: both ranks skip
the step, which leaves the bits of weights and moments as they were, and the log has the step, what it was, the numbers of
its samples and, where the loss says it, the sample and the rank."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from soak_training import prepare
from torch import Tensor

from fastcpt import guard, state, train

__all__ = ["prepare"]

UNIT = 12
SECONDS = 120
STEPS, FIRST = 48, 12  # of the run, and the first that something is injected in: spikes are known after some steps
BATCH, MICRO_BATCH, SIZE = 8, 2, 2
LAYOUTS = ["ddp", "fsdp"]
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def poison(tensor: Tensor, injection: dict[str, Any]) -> Tensor:
    """One element of the sample, or of a gradient without samples, gets the value; or all grow."""
    if injection["value"] == "spike":
        return tensor * 1e8
    result = tensor.clone()
    row = result[injection["row"]] if injection["tensor"] != "parameter" else result
    row.view(-1)[injection["place"] % row.numel()] = VALUES[injection["value"]]
    return result


def inject(injections: dict[int, dict[str, Any]], notes: Path, rank: int) -> Callable[[], None]:
    """What a rank does before it trains. Notes what each step did: [step, skipped, whether all bits stayed]."""
    now: dict[str, Any] = {}
    passed = 0

    def due(tensor: str, name: str = "") -> bool:
        here = (now.get("rank"), now.get("micro_batch"), now.get("tensor")) == (rank, passed - 1, tensor)
        return here and now["name"] == name and (torch.is_grad_enabled() or tensor == "parameter")  # not in evaluations

    def watch_module(name: str, module: torch.nn.Module) -> None:
        def hook(module: Any, arguments: Any, output_BTD: Tensor) -> Tensor | None:
            if due("gradient", name):
                output_BTD.register_hook(lambda gradient_BTD: poison(gradient_BTD, now))
            return poison(output_BTD, now) if due("activation", name) else None

        module.register_forward_hook(hook)

    def before(module: Any, arguments: Any) -> None:
        nonlocal passed
        passed += torch.is_grad_enabled()

    def after(module: Any, arguments: Any, results: tuple[Tensor, Tensor]) -> Any:
        if not due("loss"):
            return None
        return results[0] * VALUES[now["value"]], poison(results[1], now)  # and so the gradients

    def poison_gradient(name: str, parameter: torch.nn.Parameter) -> None:
        parameter.register_hook(lambda gradient: poison(gradient, now) if due("parameter", name) else gradient)

    real_setup, real_step = train.setup, train.train_step

    def setup(config: Any) -> state.State:
        made = real_setup(config)
        made.model.register_forward_pre_hook(before)
        made.model.register_forward_hook(after)
        for name, module in made.model.named_modules():
            if name.endswith(("attention", "mlp")):
                watch_module(name, module)
        if config.train.parallel == "ddp":  # FSDP's own parameters have the gradient of all
            for name, parameter in made.model.named_parameters():
                poison_gradient(name, parameter)
        return made

    def bits(made: state.State) -> list[Any]:
        return [made.optimizer.updates, *(t.view(torch.int32).clone() for t in state.local_tensors(made).values())]

    def step(made: state.State, windows: Any) -> Any:
        nonlocal passed
        passed = 0
        now.clear()
        now.update(injections.get(made.step + 1, {}))
        old = bits(made)
        result = real_step(made, windows)
        same = all(torch.equal(torch.as_tensor(one), torch.as_tensor(two)) for one, two in zip(old, bits(made)))
        with open(notes / f"steps-{rank}", "a") as file:
            print(json.dumps([made.step, result["skipped"].item() > 0, same]), file=file)
        return result

    def start() -> None:
        guard.LEAST = FIRST - 4
        train.setup, train.train_step = setup, step

    return start


def draw(randomness: random.Random, layout: str) -> dict[int, dict[str, Any]]:
    """{step: injection}, never so many in a row that the run would end."""
    steps: list[int] = []
    while len(steps) < UNIT:
        step = randomness.randint(FIRST, STEPS)
        row = {*steps, step}
        if step not in steps and not any(row >= set(range(first, first + 4)) for first in range(step - 3, step + 1)):
            steps.append(step)
    modules = [f"layers.{layer}.{part}" for layer in range(2) for part in ("attention", "mlp")]
    parameters = [f"{module}.{end}" for module in modules if module.endswith("mlp") for end in
                  ("dense_h_to_4h.weight", "dense_4h_to_h.bias")] + ["embed_in.weight", "embed_out.weight"]  # fmt: skip
    result = {}
    for step in steps:
        value = randomness.choice([*VALUES, "spike"])
        tensors = ["gradient", "parameter"][: 2 if layout == "ddp" else 1]
        tensor = randomness.choice(tensors if value == "spike" else [*tensors, "loss", "activation"])
        names = {"loss": [""], "parameter": parameters}.get(tensor, modules)
        result[step] = {
            "value": value, "tensor": tensor, "name": randomness.choice(names), "rank": randomness.randrange(SIZE),
            "micro_batch": randomness.randrange(2), "row": randomness.randrange(2), "place": randomness.randrange(10**6),
        }  # fmt: skip
    return result


def event(step: int, injection: dict[str, Any]) -> dict[str, Any]:
    """What the log must say."""
    first, rank = (step - 1) * BATCH, injection["rank"]
    sample = first + rank * BATCH // SIZE + injection["micro_batch"] * MICRO_BATCH + injection["row"]
    told = injection["tensor"] in ("loss", "activation")
    kind = "spike" if injection["value"] == "spike" else "not finite"
    found = {"not_finite": [sample] if told else [], "ranks": [rank] if told else []}
    return {"kind": kind, "samples": [first, first + BATCH], **found}


def trial(randomness: random.Random, folder: Path, prepared: Path) -> Counter[str]:
    import stops

    layout = LAYOUTS[int(folder.name.rpartition("-")[2]) % len(LAYOUTS)]
    config = stops.place_of(prepared, folder, layout, save_every=100) / "config.yaml"
    text = config.read_text().replace("tokens: 1536", f"tokens: {STEPS * BATCH * 16}, skip_spikes: 50.0")
    config.write_text(text.replace("eval_every: 4", "eval_every: 100"))
    injections = draw(randomness, layout)
    ranks = stops.Ranks(folder, {}, size=SIZE, before=lambda rank: inject(injections, folder, rank)())
    codes = ranks.wait()
    assert codes == [0] * SIZE, f"{codes}: {ranks.log.read_text()[-3000:]}"
    expected = [[step, step in injections, step in injections] for step in range(1, STEPS + 1)]
    for rank in range(SIZE):
        assert [json.loads(line) for line in (folder / f"steps-{rank}").open()] == expected, injections
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    events = {line["step"]: line["event"] for line in lines if "event" in line and line["event"]["kind"] != "alarm"}
    assert events == {step: event(step, injections[step]) for step in sorted(injections)}, injections
    parts = [f"{part}: {each[part]}" for each in injections.values() for part in ("tensor", "value", "rank")]
    return Counter({"injections": UNIT, "skipped by both": UNIT, "bits unchanged": UNIT, layout: UNIT}) + Counter(parts)

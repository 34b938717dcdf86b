"""The guide "continue an English model in Chinese without losing the English", run: docs/chinese.md and its numbers.

    python benchmarks/experiments/chinese.py FOLDER        runs every command of the guide in FOLDER, writes the numbers
    python benchmarks/experiments/chinese.py               writes the page of the numbers that there are

The text is that of Debian packages (corpus.py); the English model is a small one that the first run trains, so that all of it
takes minutes on two cores. With Pythia only `init.from`, the tokenizer and the sizes are others.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import corpus
import yaml

from fastcpt import demo

ROOT = Path(__file__).parent.parent.parent
NUMBERS = ROOT / "benchmarks" / "results" / "chinese.json"
PAGE = ROOT / "docs" / "chinese.md"
MANUALS = "usr/share/man/man*/*.gz"
corpus.SOURCES["english"] = [("manpages", MANUALS), ("manpages-dev", MANUALS), ("perl-doc", "usr/share/perl/**/*.pod")]
corpus.SOURCES["chinese"] = corpus.SOURCES["c"]
ARMS = {"plain": "Chinese alone", "replay": "25% English replayed", "extended": "25% replayed, 2,000 new tokens"}


def val(folder: str) -> list[dict[str, str]]:
    return [
        {"name": "english", "path": f"{folder}/english-val", "role": "upstream"},
        {"name": "chinese", "path": f"{folder}/chinese-val", "role": "downstream"},
    ]


def train(folder: str, chinese: float, replay: float = 0.0) -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = (
        [{"name": "chinese", "path": f"{folder}/chinese", "weight": chinese}] if chinese else []
    )
    english = {"name": "english", "path": f"{folder}/english", "weight": replay or 1.0, "replay": bool(chinese)}
    return [*sources, english] if replay or not chinese else sources


def configurations() -> dict[str, dict[str, Any]]:
    """The files of the guide."""

    def run(
        name: str, tokens: str, lr: float, source: str, data: list[Any], where: str = "shards", **more: Any
    ) -> dict[str, Any]:
        return {
            "init": {"from": source},
            "data": {"seq_len": 128, "train": data, "val": val(where)},
            "train": {"tokens": tokens, "batch_tokens": 4096, "micro_batch": 16},
            "optim": {"lr": lr, **more},
            "schedule": {"kind": "cosine", "warmup": 0.01, "min_lr_ratio": 0.1},
            "run": {"output": f"runs/{name}", "log_every": 50, "eval_every": 100, "eval_tokens": 65_536, "save_every": 1000},
        }  # fmt: skip

    sizes = {"layers": 4, "width": 96, "heads": 4, "vocab_size": 4096}
    return {
        "english": {"model": sizes, **run("english", "4M", 4e-3, "scratch", train("shards", 0.0))},
        "plain": run("plain", "2M", 2e-3, "runs/english", train("shards", 1.0)),
        "replay": run("replay", "2M", 2e-3, "runs/english", train("shards", 0.75, 0.25)),
        "extended": run(
            "extended", "2M", 2e-3, "english-zh", train("shards-zh", 0.75, 0.25), "shards-zh", embeddings_first=0.1
        ),
    }


STEPS: list[tuple[str, str, list[str]]] = [
    ("shards", "Tokenize both texts with the model's tokenizer; a part of the documents is kept for validation", [
        "fastcpt prep english.jsonl --tokenizer tokenizer.json --output shards/english --val-fraction 0.05",
        "fastcpt prep chinese.jsonl --tokenizer tokenizer.json --output shards/chinese --val-fraction 0.05",
    ]),
    ("english", "An English model. Yours is there already: `init: {from: EleutherAI/pythia-410m}`", [
        "fastcpt train --config english.yaml",
    ]),
    ("plan", "Before it starts: what will it cost, and how far is Chinese from what the model knows?", [
        "fastcpt plan --config plain.yaml --shift",
    ]),
    ("plain", "Chinese alone, to see what is lost", ["fastcpt train --config plain.yaml"]),
    ("replay", "As advised: a quarter of what it reads is the English that it knows, in the same compute", [
        "fastcpt train --config replay.yaml",
    ]),
    ("extended", "With tokens for Chinese: the text becomes shorter, and a sequence holds more of it", [
        "fastcpt extend runs/english --text chinese.jsonl --add 2000 --output english-zh",
        "fastcpt prep english.jsonl --tokenizer english-zh/tokenizer.json --output shards-zh/english --val-fraction 0.05",
        "fastcpt prep chinese.jsonl --tokenizer english-zh/tokenizer.json --output shards-zh/chinese --val-fraction 0.05",
        "fastcpt train --config extended.yaml",
    ]),
    ("between", "If the English still matters more: weights between the two models, and what each costs", [
        ("fastcpt interpolate runs/english runs/replay --upstream english=shards/english-val --downstream chinese=shards/chinese-val "
        "--seq-len 128 --tokens 65536"),
    ]),
    ("report", "What was learned and what was forgotten, as a page; and the model for everybody else", [
        "fastcpt report runs/plain runs/replay runs/extended --output report.html",
        "fastcpt export runs/extended --output model",
    ]),
]  # fmt: skip


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" in line]


def prepare(folder: Path) -> None:
    """The texts, the tokenizer and the configurations."""
    with tempfile.TemporaryDirectory() as scratch:
        texts = {name: list(dict.fromkeys(corpus.documents(name, Path(scratch)))) for name in ("english", "chinese")}
    for name, documents in texts.items():
        demo.write_jsonl(folder / f"{name}.jsonl", documents)
    demo.train_tokenizer(texts["english"], folder / "tokenizer.json")
    for name, configuration in configurations().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))


def advice(plan: str) -> list[str]:
    """The plan's warning about the shift, with the entry that it asks for."""
    lines = plan.splitlines()
    first = next(
        i for i, line in enumerate(lines) if line.startswith("warning") and "shift" in "".join(lines[i : i + 2])
    )
    return [lines[first], *itertools.takewhile(lambda line: line.startswith(" "), lines[first + 1 :])]


def run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    prepare(Path())
    said: dict[str, str] = {}
    for key, _, commands in STEPS:
        for command in commands:
            print(f"\n$ {command}", flush=True)
            done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout)
            said[key] = said.get(key, "") + done.stdout
    first, last = evaluations(Path("runs/plain"))[0], {name: evaluations(Path("runs", name)) for name in ARMS}
    numbers = {
        "start": {name: entry["bits_per_byte"] for name, entry in first["eval"].items()},
        "ends": {
            name: {of: entry["bits_per_byte"] for of, entry in lines[-1]["eval"].items()}
            for name, lines in last.items()
        },
        "extended_start": {of: entry["bits_per_byte"] for of, entry in last["extended"][0]["eval"].items()},
        "advice": advice(said["plan"]),
        "extend": [line for line in said["extended"].splitlines() if "tokens a byte" in line],
        "between": said["between"].strip().splitlines(),
        "texts": {name: Path(f"{name}.jsonl").stat().st_size for name in ("english", "chinese")},
    }
    NUMBERS.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render(numbers: dict[str, Any]) -> str:
    start, ends = numbers["start"], numbers["ends"]
    rows = ["| | English, bits a byte | Chinese, bits a byte |", "|---|---|---|"]
    rows.append(f"| the English model | {start['english']:.3f} | {start['chinese']:.3f} |")
    rows += [
        f"| {title} | {ends[name]['english']:.3f} ({ends[name]['english'] - start['english']:+.3f}) | "
        f"{ends[name]['chinese']:.3f} ({ends[name]['chinese'] - start['chinese']:+.3f}) |"
        for name, title in ARMS.items()
    ]
    lines = [
        "# Continue an English model in Chinese without losing the English", "",
        ("Every command below was run as it stands, by `benchmarks/experiments/chinese.py`, on manual pages and documentation of "
        "Debian packages and a small model, in minutes on two cores; the script has the configurations. One run each: the signs "
        "are to be learned from, not the digits. For Pythia the commands are the same."), "", *rows, "",
    ]  # fmt: skip
    shown = {"plan": numbers["advice"], "extended": numbers["extend"], "between": numbers["between"]}
    for number, (key, title, commands) in enumerate(STEPS, 1):
        lines += [f"## {number}. {title}", "", *(f"    {command}" for command in commands), ""]
        if key in ARMS:
            text = yaml.safe_dump({"data": {"train": configurations()[key]["data"]["train"]}}, sort_keys=False)
            lines += ["```yaml", text.rstrip(), "```", ""]
        if shown.get(key):
            lines += ["It says:", "", *(f"    {line}" for line in shown[key]), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
    PAGE.write_text(render(json.loads(NUMBERS.read_text(encoding="utf-8"))), encoding="utf-8")

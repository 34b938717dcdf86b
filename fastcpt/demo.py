"""The whole story on text that comes with Python: text, shards, pre-training, continued pre-training, the result.

Upstream is the English of the standard library: its manual (`pydoc_data.topics`) and its docstrings. Downstream is its
Python source, without docstrings. A model pre-trained upstream is continued downstream twice from the same checkpoint,
without and with replay of the upstream text. Both learn the code; the table shows what each forgot of the English.

Everything goes through the commands that a user would run, and stays in the output folder to look at.
"""

import ast
import json
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcpt import UserError
from fastcpt.integrity import sha256_json

VOCABULARY = 4096
EOD = "<|endoftext|>"
# Folders of the standard library that are tests, tables or vendored.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "ensurepip",
           "pydoc_data", "turtledemo"}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How long the demo runs. Tokens of pre-training and of each continuation; the rest is the model and the batch."""

    pretrain: int
    continued: int
    batch: int
    layers: int
    width: int
    seq_len: int
    eval_tokens: int
    compile: bool
    characters: int  # of each kind of text, at most


FULL = Size(1_600_000, 500_000, 4_096, 4, 96, 128, 16_384, True, 20_000_000)
QUICK = Size(120_000, 60_000, 2_048, 2, 64, 128, 8_192, False, 600_000)


def modules() -> list[Path]:
    """Source files of the standard library, in a fixed order that mixes its packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [
        root / path
        for path in sorted((p for p in paths if not SKIPPED & set(p.parts)), key=lambda p: sha256_json(str(p)))
    ]


def split_source(source: str) -> tuple[list[str], str]:
    """A module's source -> (its docstrings, the source without them)."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings, dropped = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            docstrings.append(text)
            statement = node.body[0]
            dropped |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    kept = [line for number, line in enumerate(source.split("\n"), 1) if number not in dropped]
    return docstrings, "\n".join(kept)


def texts(limit: int) -> tuple[list[str], list[str]]:
    """(upstream English, downstream code), documents in a fixed order, at most `limit` characters of each."""
    from pydoc_data.topics import topics

    english, code = {topics[name] for name in topics}, set()
    for path in modules():
        try:
            docstrings, rest = split_source(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a module that is no text or no Python is not text to learn from
        english.update(text for text in docstrings if len(text) >= 100)
        code.add(rest)
        if min(sum(map(len, english)), sum(map(len, code))) >= limit:
            break
    return _limited(english, limit), _limited(code, limit)


def _limited(documents: set[str], limit: int) -> list[str]:
    """Documents in the order of their hashes, so that the limit takes from all kinds, up to `limit` characters."""
    kept, total = [], 0
    for document in sorted(documents, key=sha256_json):
        if document and total + len(document) <= limit:
            kept.append(document)
            total += len(document)
    return kept


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def train_tokenizer(documents: list[str], path: Path) -> None:
    """A byte-level BPE on the upstream text alone, as Pythia's was trained on the Pile alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))


def configurations(size: Size, output: Path) -> dict[str, dict[str, Any]]:
    """The three runs as the YAML files that `fastcpt train --config` reads."""

    def run(name: str, tokens: int, lr: float, init: str, upstream: float, downstream: float) -> dict[str, Any]:
        shares = (("english", upstream), ("code", downstream))
        return {
            "model": {"layers": size.layers, "width": size.width, "heads": 4, "vocab_size": VOCABULARY},
            "init": {"from": init},
            "data": {
                "seq_len": size.seq_len,
                "train": [
                    {"name": text, "path": str(output / "shards" / text), "weight": weight,
                     "replay": text == "english" and init != "scratch"}
                    for text, weight in shares if weight
                ],
                "val": [
                    {"name": "english", "path": str(output / "shards" / "english-val"), "role": "upstream"},
                    {"name": "code", "path": str(output / "shards" / "code-val"), "role": "downstream"},
                ],
            },
            "train": {"tokens": tokens, "batch_tokens": size.batch, "micro_batch": 16,  # 2,048 tokens: their logits stay in a CPU's cache
 "compile": size.compile},
            "optim": {"lr": lr},
            "schedule": {"kind": "cosine", "warmup": 0.02, "min_lr_ratio": 0.1},
            "run": {"output": str(output / "runs" / name), "log_every": 20, "eval_every": 40, "eval_tokens": size.eval_tokens, "save_every": 200},
        }  # fmt: skip

    base = str(output / "runs" / "pretrain")
    return {
        "pretrain": run("pretrain", size.pretrain, 4e-3, "scratch", 1.0, 0.0),
        "continue": run("continue", size.continued, 2e-3, base, 0.0, 1.0),
        "replay": run("replay", size.continued, 2e-3, base, 0.25, 0.75),
    }


def final(run: Path) -> dict[str, Any]:
    """The last evaluation line of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" in line][-1]


def table(output: Path) -> str:
    """What each run ended with, and what it forgot and learned since the pre-trained model."""
    rows = [("run", "English loss", "code loss", "bits/byte", "forgetting", "adaptation")]
    titles = {"pretrain": "pre-trained on English", "continue": "+ code, no replay", "replay": "+ code, 25% replay"}
    for name, title in titles.items():
        line = final(output / "runs" / name)
        english, code = line["eval"]["english"], line["eval"]["code"]
        bits = f"{english['bits_per_byte']:.3f} / {code['bits_per_byte']:.3f}"
        changes = ("", "") if name == "pretrain" else (f"{line['forgetting']:+.3f}", f"{line['adaptation']:+.3f}")
        rows.append((title, f"{english['loss']:.3f}", f"{code['loss']:.3f}", bits, *changes))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if not i else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def run(output: Path, quick: bool) -> int:
    """Runs all of it into `output`, which it makes anew. Returns the exit code."""
    import yaml

    from fastcpt import train
    from fastcpt.data_prep.pretokenize import prep
    from fastcpt.report import report

    started = time.perf_counter()
    size = QUICK if quick else FULL
    if output.exists():
        if not (output / ".demo").exists():
            raise UserError("output-exists", f"{output}: exists and is not a demo's folder; name another with --output")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / ".demo").touch()
    english, code = texts(size.characters)
    print(
        f"text: {sum(map(len, english)):,} characters of English, {sum(map(len, code)):,} of code, from Python's standard library"
    )
    write_jsonl(output / "english.jsonl", english)
    write_jsonl(output / "code.jsonl", code)
    train_tokenizer(english, output / "tokenizer.json")
    for name in ("english", "code"):
        prep(
            [str(output / f"{name}.jsonl")], tokenizer=str(output / "tokenizer.json"),
            output=output / "shards" / name, val_fraction=0.1,
        )  # fmt: skip
    for name, configuration in configurations(size, output).items():
        path = output / f"{name}.yaml"
        path.write_text(yaml.safe_dump(configuration, sort_keys=False))
        print(f"\nfastcpt train --config {path}", flush=True)
        code_of_run = train.main(["--config", str(path)])
        if code_of_run:
            return code_of_run
    result = table(output)
    (output / "result.txt").write_text(result + "\n")
    try:
        page = str(
            report([str(output / "runs" / name) for name in configurations(size, output)], output / "report.html")[0]
        )
    except UserError as error:  # the figures are an extra
        page = f"none: {error}"
    minutes, seconds = divmod(int(time.perf_counter() - started), 60)
    print(f"\n{result}\n\nforgetting: English loss now - before the continuation; adaptation: code loss before - now")
    print(f"report: {page}\n{minutes} min {seconds} s; everything is in {output}/")
    return 0

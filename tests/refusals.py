"""What fastcpt refuses: the catalogue (refused_*.py) run as users run it, and docs/errors.md made of it.

    python tests/refusals.py        writes docs/errors.md

Each case starts from a copy of `workspace`: shard sets, a run, its export, token files. It damages something, runs a
command, and expects exit code 2, one line that ends in the id, and that nothing which was there has changed.
"""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from fastcpt import cli
from fastcpt.integrity import sha256_json

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
ROOMS = ("fastcpt", "data_prep", "kernels", "benchmarks")
TENSORS_FILE = "tensors-00001-of-00001.safetensors"  # of a checkpoint of one process
Damage = Callable[[Path], Any]
RAISERS = ("UserError", "DamagedError", "require", "refuse")  # an id is one of their arguments, or of a table's row
REASONS = ("Bad", "ArchiveError", "Reject")  # `input-` and their first argument


@dataclass(frozen=True)
class Case:
    """when: what the user did. says: the whole message, "…" for what differs from case to case. damage: changes the
    workspace; a context manager that it returns is open while the command runs."""

    id: str
    when: str
    command: str
    says: str
    damage: Damage = lambda folder: None

    @property
    def pattern(self) -> str:
        return ".+".join(re.escape(part) for part in self.says.split("…"))


def workspace(folder: Path) -> None:
    """All that cases start from, made by the commands themselves in the current folder `folder`."""
    from fastcpt.demo import train_tokenizer, write_jsonl

    texts = {"text": "the quick brown fox jumps over the lazy dog. ", "code": "for i in range(10): print(i) # count\n"}
    for name, text in texts.items():
        documents = [f"Document {i}: " + text * (1 + i % 7) for i in range(200)]
        write_jsonl(folder / f"{name}.jsonl", documents)
        train_tokenizer(documents, folder / f"{name}.json")
    configuration = {
        "model": {"layers": 1, "width": 16, "heads": 2, "vocab_size": 640},
        "data": {
            "seq_len": 32,
            "train": [{"name": "text", "path": "shards", "weight": 1}],
            "val": [{"name": "text", "path": "shards-val", "role": "upstream"}],
        },
        "train": {"tokens": 1024, "batch_tokens": 256, "micro_batch": 4, "compile": False},
        "optim": {"lr": 3e-3},
        "schedule": {"warmup": 0},
        "run": {"output": "run", "save_every": 2, "log_every": 1, "eval_tokens": 512, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration))
    commands = [
        "prep text.jsonl --tokenizer text.json --output shards --val-fraction 0.2 --workers 1",
        "prep text.jsonl --tokenizer code.json --output other --workers 1",
        "prep code.jsonl --tokenizer text.json --output fresh --workers 1",
        "train --config run.yaml",
        "export run --output hf",
    ]
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            assert cli.main(command.split()) == 0, said.getvalue()
    tokens = np.array([5, 6, 0, 7, 0, 8, 9, 10, 0], "<u2")
    (folder / "tokens.bin").write_bytes(tokens.tobytes())
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (folder / "llmc.bin").write_bytes(header.tobytes() + tokens.tobytes())


def refuse(case: Case, folder: Path, run: Callable[[list[str]], tuple[int, str]]) -> None:
    """Runs a case in `folder`, a copy of the workspace and the current folder. run: a command -> (exit code, stderr)."""
    held = case.damage(folder)
    before = contents(folder.parent)
    with held if hasattr(held, "__enter__") else contextlib.nullcontext():
        code, errors = run(shlex.split(case.command))
    lines = [line for line in errors.splitlines() if not line.startswith(("warning: ", "tokenized "))]
    assert code == 2, errors
    (line,) = lines
    assert re.fullmatch(rf"fastcpt: {case.pattern} \[{case.id}\]", line), f"\n{line}\n{case.says}"
    after = contents(folder.parent)
    assert {path: after.get(path) for path in before} == before, "something was changed"
    # A run's folder is claimed before all is known that can be wrong with it; nothing else is left behind.
    left = {path for path in after.keys() - before.keys() if not re.search(r"/(new|run|set\.partial)/", path)}
    assert not left, left


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """{path: what it holds} of all below a folder; left out is what says who runs, and how it ended."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif not {"lock", ".lock", "exit-code", ".ranks"} & {path.name, path.parent.name} and path.is_file():
            found[str(path)] = path.read_bytes()
    return found


# Damage


def both(*damages: Damage) -> Damage:
    def apply(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return apply


def put(name: str, content: bytes | str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def change(name: str, function: Callable[[bytearray], Any]) -> Damage:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        function(data)
        (folder / name).write_bytes(data)

    return apply


def flip(name: str, at: int) -> Damage:
    return change(name, lambda data: data.__setitem__(at, data[at] ^ 1))


def cut(name: str, count: int = 1) -> Damage:
    return change(name, lambda data: data.__delitem__(slice(len(data) - count, None)))


def edit(name: str, old: str, new: str) -> Damage:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, text
        (folder / name).write_text(text.replace(old, new))

    return apply


def gone(name: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def copied(source: str, target: str) -> Damage:
    return both(lambda folder: shutil.copy(folder / source, folder / target))


def moved(source: str, target: str) -> Damage:
    return both(lambda folder: shutil.move(folder / source, folder / target))


def link(name: str, target: str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def recoded(name: str, function: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes what a JSON file holds."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_bytes())
        function(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def sealed(name: str, function: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes a manifest and makes its own hash anew."""

    def anew(value: dict[str, Any]) -> None:
        del value["sha256"]
        function(value)
        value["sha256"] = sha256_json(value)

    return recoded(name, anew)


def model(**changes: Any) -> Damage:
    """Changes keys of a Hugging Face model's config.json; None removes one."""

    def anew(config: dict[str, Any]) -> None:
        config.update(changes)
        for key in [key for key in changes if changes[key] is None]:
            del config[key]

    return recoded("hf/config.json", anew)


def absent(name: str) -> Damage:
    """A package is not installed."""
    return lambda folder: mock.patch.dict("sys.modules", {name: None})


def tensors(function: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes the tensors of a Hugging Face model."""

    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "hf" / "model.safetensors"
        loaded = load_file(path)
        function(loaded)
        save_file(loaded, path)

    return apply


def with_index(folder: Path) -> None:
    """The model in the hub's form for large ones: an index, and files that it names."""
    from safetensors.torch import load_file

    names = load_file(folder / "hf" / "model.safetensors").keys()
    (folder / "hf" / "model.safetensors").rename(folder / "hf" / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))


# The page


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def source_ids() -> dict[str, list[tuple[str, str]]]:
    """{id: [(file, message)]} of all the source; "…" stands for what a message fills in."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(file for room in ROOMS for file in (ROOT / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts, ids = _said(node)
            for id in ids:
                texts = [text for part in parts if " " in (text := template(part))]
                found.setdefault(id, []).append((str(path.relative_to(ROOT)), texts[0] if texts else ""))
    return found


def _said(node: ast.AST) -> tuple[list[ast.expr], list[str]]:
    """(parts of a call or a tuple, the ids among them)."""
    if isinstance(node, ast.FunctionDef):
        names = [argument.arg for argument in node.args.args][-len(node.args.defaults) or len(node.args.args) :]
        parts = [value for name, value in zip(names, node.args.defaults) if name == "id"]
    elif isinstance(node, ast.Call):
        parts = node.args if ast.unparse(node.func) in (*REASONS, *RAISERS) else []
    else:
        parts = node.elts if isinstance(node, ast.Tuple) and len(node.elts) > 2 else []
    strings = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in REASONS:
        return parts, [f"input-{text.lower().replace(' ', '-')}" for text in strings[:1] if isinstance(text, str)]
    if isinstance(node, ast.Tuple):
        strings = strings[-1:]
    return parts, [
        text for text in strings if isinstance(text, str) and re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)+", text)
    ]


def template(node: ast.AST) -> str:
    """The text of a string in the source, "…" for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def page() -> str:
    """docs/errors.md."""
    cases = catalogue()
    lines = [
        "# Errors",
        "",
        "What you can mend ends a command with exit code 2 and one line: the message, which names the file, the offset or",
        "step, the value and the mend, and last an id in brackets. Nothing that was there has been changed.",
        "",
        f"This page is made by `python tests/refusals.py` of {len(cases)} cases that the tests run, and of the source.",
        "`…` stands for what differs.",
        "",
        "| id | cause | it says |",
        "|---|---|---|",
    ]
    lines += [f"| `{case.id}` | {cell(case.when)} | {cell(case.says)} |" for case in sorted(cases, key=lambda c: c.id)]
    lines += ["", "## Others", "", "| id | it says | raised in |", "|---|---|---|"]
    shown = {case.id for case in cases}
    for id, places in sorted(source_ids().items()):
        if id not in shown:
            files = ", ".join(sorted({f"`{file}`" for file, _ in places}))
            lines.append(f"| `{id}` | {cell(places[0][1])} | {files} |")
    return "\n".join(lines) + "\n"


def catalogue() -> tuple[Case, ...]:
    import refused_inputs
    import refused_runs
    import refused_sweeps

    return refused_runs.CASES + refused_inputs.CASES + refused_sweeps.CASES


if __name__ == "__main__":
    import refusals  # the cases' own Case, and not this module's

    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(refusals.page(), encoding="utf-8")

"""The command line as a user meets it: help on one screen, one line an error, exit codes, and the whole path on files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastcpt import __version__, cli

COMMANDS = ["prep", "convert", "inspect", "verify", "plan", "train", "eval", "export", "merge", "interpolate", "extend", "report",
            "bench", "demo"]  # fmt: skip


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=cwd, check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def fastcpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(str(Path(sys.executable).with_name("fastcpt")), *arguments, cwd=cwd)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_one_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    try:
        code = cli.main([command, "--help"] if command else ["--help"])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr().out
    assert code == 0
    assert len(printed.splitlines()) <= 30 and max(map(len, printed.splitlines())) <= 110
    if not command:
        assert all(f"    {name}" in printed for name in COMMANDS)


def test_help_starts_without_torch(tmp_path: Path) -> None:
    script = "import sys\nsys.modules['torch'] = None\nfrom fastcpt import cli\ncli.main(['--help'])\n"
    done = run(sys.executable, "-c", script, cwd=tmp_path)
    assert done.returncode == 0 and "COMMAND" in done.stdout, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastcpt {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["inspect", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
        (["inspect", "nowhere", "--step", "1"], "nowhere"),
        (["report", "nowhere", "--output", "r.html"], "nowhere"),
        (["plan", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--optim.lr", "1e-3"], "data.train"),
        (["eval", "nowhere", "--data", "x=nowhere"], "nowhere"),
        (["eval", "nowhere", "--data", "x"], "NAME=DIR"),
        (["export", "no-where", "--output", "out"], "no-where"),
        (["prep", "nowhere.jsonl", "--tokenizer", "nothing.json", "--output", "out"], "nothing.json"),
        (["prep", "--tokenizer", "t.json", "--output", "out"], "INPUT"),
        (["bench", "nothing"], "nothing"),
        (["nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and re.fullmatch(r"fastcpt: .* \[[a-z]+(-[a-z0-9]+)*\]", line)


def test_static_proofs_refuse_the_interpreter(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "fastcpt.cli", "bench", "kernels", "--static", cwd=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2 and done.stderr.startswith("fastcpt: TRITON_INTERPRET is set"), done.stderr


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a tokenizer, shards through `fastcpt prep`, and a configuration."""
    from fastcpt.demo import train_tokenizer, write_jsonl

    folder = tmp_path_factory.mktemp("cli")
    documents = [f"Document {i}: " + "the quick brown fox jumps over the lazy dog. " * (1 + i % 7) for i in range(300)]
    write_jsonl(folder / "text.jsonl", documents)
    train_tokenizer(documents, folder / "tokenizer.json")
    done = fastcpt(
        "prep", "text.jsonl", "--tokenizer", "tokenizer.json", "--output", "shards", "--val-fraction", "0.2", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    configuration = {
        "model": {"layers": 1, "width": 16, "heads": 2, "vocab_size": 640},
        "data": {
            "seq_len": 32,
            "train": [{"name": "text", "path": "shards", "weight": 1}],
            "val": [{"name": "text", "path": "shards-val", "role": "upstream"}],
        },
        "train": {"tokens": "1K", "batch_tokens": 256, "micro_batch": 4, "compile": False},
        "optim": {"lr": 3e-3},
        "run": {"output": "run", "save_every": 2, "log_every": 1, "eval_tokens": 1024},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration))
    return folder


def test_from_text_to_a_model_in_transformers(workspace: Path) -> None:
    """prep -> inspect -> verify -> train -> eval -> export -> transformers, every step as a command."""
    done = fastcpt("inspect", "shards", "--decode", "1", cwd=workspace)
    assert done.returncode == 0 and "Document" in done.stdout
    done = fastcpt("train", "--config", "run.yaml", cwd=workspace)
    assert done.returncode == 0, done.stderr
    last = json.loads((workspace / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    for path in ("shards", "run", "run/checkpoints/step-4"):
        assert fastcpt("verify", path, cwd=workspace).returncode == 0
    done = fastcpt("eval", "run", "--data", "text=shards-val", "--seq-len", "32", "--tokens", "1024", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert f"{last['eval']['text']['loss']:.4f}" in done.stdout
    done = fastcpt("export", "run", "--output", "exported", cwd=workspace)
    assert done.returncode == 0, done.stderr
    again = fastcpt(
        "eval", "exported", "--data", "text=shards-val", "--seq-len", "32", "--tokens", "1024", cwd=workspace
    )
    assert f"{last['eval']['text']['loss']:.4f}" in again.stdout
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(workspace / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(workspace / "exported")
    encoded = tokenizer("the quick brown fox", return_tensors="pt")
    with torch.no_grad():
        generated = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(generated[0]).startswith("the quick brown fox")


@pytest.mark.parametrize(
    "launch",
    [
        ["{bin}/torchrun", "--standalone", "--nproc_per_node=2", "{file}"],
        ["{bin}/torchrun", "--standalone", "--nproc_per_node=2", "-m", "fastcpt.train"],
        ["{bin}/torchrun", "--standalone", "--nproc_per_node=2", "--no-python", "{bin}/fastcpt", "train"],
        ["{bin}/python", "-m", "fastcpt.train"],
    ],
    ids=["torchrun file", "torchrun -m", "torchrun fastcpt", "python -m"],
)
def test_every_way_to_start_from_any_folder(launch: list[str], workspace: Path, tmp_path: Path) -> None:
    file = Path(__file__).parent.parent / "fastcpt" / "train.py"
    words = [word.format(bin=Path(sys.executable).parent, file=file) for word in launch]
    done = run(
        *words, "--config", str(workspace / "run.yaml"), "--run.output", str(tmp_path / "run"), cwd=workspace, PYTHONSAFEPATH=""
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-4").is_dir()


def test_a_changed_configuration_is_refused_with_the_difference(workspace: Path, tmp_path: Path) -> None:
    options = ["--config", "run.yaml", "--run.output", str(tmp_path / "run")]
    assert fastcpt("train", *options, cwd=workspace).returncode == 0
    done = fastcpt("train", *options, "--optim.lr", "1e-4", "--train.micro_batch", "2", cwd=workspace)
    assert done.returncode == 2
    assert "optim.lr was 0.003, is 0.0001" in done.stderr and "micro_batch" not in done.stderr

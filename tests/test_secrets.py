"""Twenty planted secrets, in the environment, in URLs, in settings and on the command line, are in nothing that is written.

Looked through are all that commands print and every file that they leave, archives and parquet files by their content.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from fastcpt import cli, hidden

VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY",
    "GITHUB_TOKEN", "OPENAI_API_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_TOKEN",
)  # fmt: skip
SECRETS = {name: f"canary{number:02}Zq7xVw" for number, name in enumerate(VARIABLES)}
# In URLs: {where: secret}. The commands below hold them.
URLS = {
    name: f"canary{number:02}Kp3mRt"
    for number, name in enumerate(("input", "pattern", "output", "tokenizer", "data", "start", "run", "project", "ray", "proxy"), 10)
}  # fmt: skip
TYPED = "hf_canary20Bb8nLqAbCdEfGhIj"
TRAIN = "train --config run.yaml --run.output new"
PREP = "prep text.jsonl --workers 1 --tokenizer text.json"
COMMANDS = [
    (f"{PREP} --output set --val-fraction 0.1", 0),
    (f"prep s3://me:{URLS['input']}@bucket/a.jsonl --tokenizer text.json --output set2", 2),
    (f"prep https://{URLS['pattern']}@host/*.jsonl --tokenizer text.json --output set2", 2),
    (f"{PREP} --output s3://me:{URLS['output']}@bucket/set", 2),
    (f"prep text.jsonl --tokenizer https://me:{URLS['tokenizer']}@host/t.json --output set2", 2),
    ("inspect set --decode 1", 0),
    ("verify set", 0),
    ("train --config run.yaml --run.output new --run.wandb project --run.tensorboard true", 0),
    (f"{TRAIN}1 --data.train [{{name: a, path: 's3://me:{URLS['data']}@bucket/a', weight: 1}}]", 2),
    (f"{TRAIN}2 --init.from https://me:{URLS['start']}@host/model", 2),
    (f"train --config run.yaml --run.output s3://me:{URLS['run']}@bucket/run", 2),
    (f"{TRAIN}3 --run.wandb https://me:{URLS['project']}@host/project", 2),
    (f"{TRAIN}4 --hf_token {TYPED}", 2),
    (f"{TRAIN}5 --train.micro_batch {TYPED}", 2),
    ("plan --config run.yaml", 0),
    ("eval new --data a=set-val --seq-len 32", 0),
    ("export new --output model", 0),
    ("export new --output model2 --push me/model", 2),
    ("report new --output page.html", 0),
    ("inspect new --step 1", 0),
    (f"{PREP} --output set3 --engine ray --ray-address me:{URLS['ray']}@127.0.0.1:1", 2),
]


def found(secrets: list[str], folder: Path) -> dict[str, list[str]]:
    """{file: the secrets in it} of a folder."""
    places: dict[str, list[str]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = str(path).encode() + path.read_bytes()
            if path.suffix == ".parquet":
                content += json.dumps(pq.read_table(path).to_pylist()).encode()
            if inside := [secret for secret in secrets if secret.encode() in content]:
                places[str(path)] = inside
    return places


def test_no_secret_is_in_anything_written(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = [*SECRETS.values(), *URLS.values(), TYPED]
    assert len(set(secrets)) >= 20
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("https_proxy", f"http://me:{URLS['proxy']}@127.0.0.1:1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: SECRETS["HF_TOKEN"])
    told: list[Any] = []  # what Weights & Biases is given
    logged = SimpleNamespace(starting_step=0, log=lambda *line, **more: told.append((line, more)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **more: told.append(more) or logged))
    output = ""
    for words, expected in COMMANDS:
        command, _, list_ = words.partition(" [")
        code = cli.main([*command.split(), *([f"[{list_}"] if list_ else [])])
        printed = capfd.readouterr()
        output += printed.out + printed.err
        assert code == expected, (words, printed.err)
    assert len(told) > 4 and output.count("***") >= 8
    assert not [secret for secret in secrets if secret in output + repr(told)]
    assert found(secrets, work) == {}
    (work / "set" / "note").write_text(secrets[7])  # and the search does find one
    assert found(secrets, work) == {str(work / "set" / "note"): [secrets[7]]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:word@bucket/a@b", "s3://***@bucket/a@b"), ("s3:/me:word@bucket", "s3:/***@bucket"),
        ("https://word@host", "https://***@host"), ("cache::s3://a:b@c", "cache::s3://***@c"),
        ("some/model@main: a@b.c", "some/model@main: a@b.c"), ("C:/a", "C:/a"), ("me:word@host:1", "me:***@host:1"), ("hf_" + "a" * 30, "***"),
        ("ghp_" + "a" * 36, "***"), ("AKIA" + "A" * 16, "***"), ("hf_model and sk-learn", "hf_model and sk-learn"),
        ("shelf_" + "a" * 30, "shelf_" + "a" * 30), ("the secretvalue1 of MY_SECRET", "the *** of MY_SECRET"),
    ],
)  # fmt: skip
def test_what_is_hidden(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "secretvalue1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert hidden(text) == shown

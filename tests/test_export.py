"""The model card, read back by the hub's own client and by a Markdown parser, and the way to the hub, on a stand-in."""

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from fastcpt import UserError, checkpoint, hf, train
from fastcpt import export as exporting
from fastcpt.config import Config, Count, Source, ValidationSet
from fastcpt.export import export, model_card
from fastcpt.weights import Weights

SEQ_LEN, BATCH = 16, 6
ODD = "a|b: `c` *d* _e_ [f](g) <h> ~~i~~ &lt; \\|\n---\nlicense: mit\n"  # would break tables, Markdown, YAML
ODD_SHOWN = " ".join(ODD.split())
TOKEN = "hf_" + "SecretOfTheUser" * 2


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "eval" in line]


def tables(card: str) -> list[list[list[str]]]:
    """Every table of the card as a Markdown parser sees it: rows of the text that a reader sees."""
    found: list[list[list[str]]] = []
    parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    for before, token in pairwise(parsed):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif before.type in ("th_open", "td_open"):
            children = token.children or []
            assert all(child.type in ("text", "text_special", "code_inline") for child in children)
            found[-1][-1].append("".join(child.content for child in children))
    return found


def words(card: str) -> str:
    return " ".join(ModelCard(card).text.split())


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, write_shards: Any, random_documents: Any) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate(("old", "new", "old-val", "new-val")):
        write_shards(folder / name, random_documents(seed, 40))
    return folder


@pytest.fixture(scope="module")
def make_config(sets: Path, tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """make_config(output, replay, **sections): 5 steps on new with a part of old, validated on both."""

    def make(output: Path | str, replay: float = 0.0, **sections: dict[str, Any]) -> Config:
        sources = [Source(name=ODD, path=str(sets / "new"), weight=1 - replay)]
        if replay:
            sources.append(Source(name="old", path=str(sets / "old"), weight=replay, replay=True))
        data = {
            "train": sources,
            "val": [
                ValidationSet(name=ODD, path=str(sets / "new-val"), role="downstream"),
                ValidationSet(name="old", path=str(sets / "old-val"), role="upstream"),
            ],
            "seq_len": SEQ_LEN,
        }
        run = {"log_every": 1, "eval_every": 2, "save_every": 2, "eval_tokens": Count(100), "keep": 9}
        sections["data"] = data | sections.get("data", {})
        sections["run"] = run | sections.get("run", {})
        return tiny_config(output, **sections)

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]) -> Path:
    """base, from scratch, and cpt, continued from it with a quarter of replay."""
    folder = tmp_path_factory.mktemp("runs")
    train.train(make_config(folder / "base"))
    old = {"init": {"from_": str(folder / "base"), "force": True}, "train": {"tokens": Count(5 * BATCH * SEQ_LEN)}}
    train.train(make_config(folder / "cpt", 0.25, **old))
    return folder


# The card


def test_the_clients_own_reader_finds_the_facts(runs: Path) -> None:
    data = ModelCard(model_card(str(runs / "cpt"))).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["continual-pretraining", "gpt_neox"]
    assert data.model_name == "cpt"
    # A base on this machine is no model of the hub, and nobody said a license.
    assert "base_model" not in data.to_dict() and "license" not in data.to_dict()
    measured = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    last = evaluations(runs / "cpt")[-1]["eval"]
    assert measured == {
        (shown, metric): last[name][metric]
        for name, shown in ((ODD, ODD_SHOWN), ("old", "old"))
        for metric in ("loss", "bits_per_byte")
    }
    state = checkpoint.read_state(runs / "cpt" / "checkpoints" / "step-5")
    fingerprints = state["data"]["fingerprints"]["val"].values()
    assert {result.dataset_revision for result in data.eval_results} == {value[:12] for value in fingerprints}


def test_a_reader_of_the_card_finds_the_numbers(runs: Path) -> None:
    card = model_card(str(runs / "cpt"))
    model, data, training, evaluation = tables(card)
    assert dict(model)["layers, width, heads"] == "2, 24, 3"
    ours = Weights.open(str(runs / "cpt")).model()
    assert dict(model)["parameters"].startswith(f"{sum(each.numel() for each in ours.parameters()):,} (")
    state = checkpoint.read_state(runs / "cpt" / "checkpoints" / "step-5")
    fingerprints, seen = state["data"]["fingerprints"]["train"], state["data"]["seen"]
    replayed = next(count for key, count in seen.items() if key.startswith(f"{fingerprints['old']} "))
    assert sum(seen.values()) == 5 * BATCH
    assert data[1:] == [
        [ODD_SHOWN, "75%", f"{seen[fingerprints[ODD]] * SEQ_LEN:,}", "no", fingerprints[ODD][:12]],
        ["old", "25%", f"{replayed * SEQ_LEN:,}", "yes", fingerprints["old"][:12]],
    ]
    facts = dict(training)
    assert facts["tokens"] == f"{5 * BATCH * SEQ_LEN} ({5 * BATCH * SEQ_LEN}) in this run"
    assert facts["steps"] == f"5 of 5, each of {BATCH * SEQ_LEN} tokens"
    assert facts["learning rate"].startswith(
        "1 steps of warm-up to 0.001, then cosine to 0.0001 over 4; 0.0001 at the last step"
    )
    first, *_, last = evaluations(runs / "cpt")
    for row, name in zip(evaluation[1:], (ODD, "old")):
        start, end = first["eval"][name], last["eval"][name]
        values = [start["loss"], end["loss"], start["bits_per_byte"], end["bits_per_byte"]]
        expected = [" ".join(name.split()), end["role"], *(f"{value:.4f}" for value in values), str(end["tokens"])]
        assert row == expected
    text = words(card)
    assert "The start is step 0; the end is step 5." in text
    assert f"forgetting: {last['forgetting']:+.4f}" in text and f"adaptation: {last['adaptation']:+.4f}" in text
    assert "continually pre-trained from the weights of base." in text


def test_nothing_of_this_machine_is_in_the_card(runs: Path, sets: Path) -> None:
    for name in ("base", "cpt"):
        card = model_card(str(runs / name))
        assert str(runs) not in card and str(sets) not in card and str(Path.home()) not in card


def test_a_run_from_scratch_is_no_continual_one(runs: Path) -> None:
    card = model_card(str(runs / "base"))
    assert ModelCard(card).data.tags == ["gpt_neox"]
    assert "pre-trained from new weights" in words(card)


def test_an_earlier_checkpoint_has_its_own_numbers(runs: Path) -> None:
    card = model_card(str(runs / "cpt" / "checkpoints" / "step-2"))
    at_2 = next(line for line in evaluations(runs / "cpt") if line["step"] == 2)
    assert "the end is step 2." in words(card) and f"forgetting: {at_2['forgetting']:+.4f}" in words(card)
    assert dict(tables(card)[2])["steps"].startswith("2 of 5")


def test_an_end_that_was_not_measured_at_the_checkpoint_says_so(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "cpt", tmp_path / "cpt")
    kept = [line for line in lines(tmp_path / "cpt") if line["step"] < 5]
    (tmp_path / "cpt" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in kept) + '{"step": 5, "ev'
    )
    assert "the end is step 4, but the weights are those of step 5." in words(model_card(str(tmp_path / "cpt")))


@pytest.mark.parametrize("case", ["alone", "no metrics", "another run's metrics"])
def test_what_is_not_known_is_said_to_be_unknown(runs: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "moved" if case == "alone" else tmp_path / "other" / "checkpoints" / "step-5"
    shutil.copytree(runs / "cpt" / "checkpoints" / "step-5", path)
    if case == "another run's metrics":
        shutil.copy(runs / "base" / "metrics.jsonl", tmp_path / "other")
    card = model_card(str(path))
    data = ModelCard(card).data
    assert data.eval_results is None and data.model_name is None
    assert words(card).startswith("# cpt " if case == "alone" else "# other ")
    assert "the end is unknown, because" in words(card) and "forgetting: unknown" in words(card)
    start = evaluations(runs / "cpt")[0]["eval"]["old"]["loss"]
    assert tables(card)[3][2] == ["old", "upstream", f"{start:.4f}", *["unknown"] * 4]


def test_a_run_without_validation_sets(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    train.train(make_config(tmp_path / "run", data={"val": []}))
    assert "had no validation sets: forgetting and adaptation are unknown" in words(model_card(str(tmp_path / "run")))


def test_a_branch_tells_both_mixtures(runs: Path, tmp_path: Path, make_config: Callable[..., Config]) -> None:
    init = {"from_": str(runs / "cpt" / "checkpoints" / "step-4"), "branch": True}
    train.train(make_config(tmp_path / "cooled", init=init, optim={"lr": None}, schedule={"warmup": 0}))
    card = model_card(str(tmp_path / "cooled"))
    state = checkpoint.read_state(tmp_path / "cooled" / "checkpoints" / "step-9")
    assert "trained on from cpt, step-4 at its step 4 with a new schedule" in words(card)
    assert f"From token 0 to {4 * BATCH * SEQ_LEN} the mixture was {ODD_SHOWN[:3]}" in words(card).replace("\\", "")
    rows = {row[0]: row for row in tables(card)[1][1:]}
    seen, fingerprints = (
        state["data"]["seen"],
        [source["fingerprint"] for source in state["data"]["phases"][0]["sources"]],
    )
    assert rows[ODD_SHOWN][1:3] == ["100%", f"{seen[fingerprints[0]] * SEQ_LEN:,}"]
    replayed = next(count for key, count in seen.items() if key.startswith(f"{fingerprints[1]} "))
    assert rows["old"][1:4] == ["no longer", f"{replayed * SEQ_LEN:,}", "unknown"]
    facts = dict(tables(card)[2])
    assert facts["tokens before"] == f"{4 * BATCH * SEQ_LEN}, to step 4" and facts["steps"].startswith("5 of 5")


@pytest.fixture
def from_hub(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config]) -> Any:
    """from_hub(source): a run that started from a model of the hub, whose client delivers a folder of ours."""
    export(str(runs / "base"), str(tmp_path / "downloaded"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "downloaded"))
    monkeypatch.chdir(tmp_path)

    def make(source: str) -> Path:
        train.train(make_config("runs/cpt", init={"from_": source}))
        return tmp_path / "runs" / "cpt"

    return make


def test_a_base_of_the_hub_is_named(from_hub: Any) -> None:
    card = model_card(str(from_hub("EleutherAI/pythia-14m@step3000")))
    assert ModelCard(card).data.base_model == "EleutherAI/pythia-14m"
    link = "[EleutherAI/pythia-14m](https://huggingface.co/EleutherAI/pythia-14m) at revision step3000"
    assert link in words(card) and "not known here in full" in words(card)


def test_a_relative_path_that_looks_like_a_hub_id_is_none(
    from_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(tmp_path / "downloaded", tmp_path / "models" / "pythia-14m")
    run = from_hub("models/pythia-14m")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the path leads nowhere
    card = model_card(str(run))
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "from the weights of pythia-14m." in words(card)


def test_a_model_that_fastcpt_did_not_train(runs: Path, tmp_path: Path) -> None:
    export(str(runs / "cpt"), str(tmp_path / "one"))
    card = model_card(str(tmp_path / "one"))
    assert "The weights of one, written again by fastcpt, which did not train them." in words(card)
    assert ModelCard(card).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    (tmp_path / "one" / "tokenizer.json").unlink()
    assert "AutoModelForCausalLM.from_pretrained" in model_card(str(tmp_path / "one"))


def test_an_export_has_its_card(runs: Path, tmp_path: Path) -> None:
    assert export(str(runs / "cpt"), str(tmp_path / "out")) == str(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == model_card(str(runs / "cpt"))
    ours = Weights.open(str(runs / "cpt")).model()
    assert all((a == b).all() for a, b in zip(ours.parameters(), hf.load_pretrained(tmp_path / "out").parameters()))


# The hub: a stand-in on this machine, which the client finds through HF_ENDPOINT


@dataclasses.dataclass
class Hub:
    """What the stand-in answers and what it was told."""

    endpoint: str = ""
    refusal: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)  # {part of a path: status, message}
    mode: str = "regular"  # how weights are to be sent: in the commit, or beforehand as "lfs"
    created: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    committed: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    large: dict[str, bytes] = dataclasses.field(default_factory=dict)
    tokens: list[str] = dataclasses.field(default_factory=list)

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The hub's API as huggingface_hub 2.4 speaks it (its `hf_api.py`, `_commit_api.py`, `lfs.py`)."""
        for part, (status, message) in self.refusal.items():
            if part in path:
                return status, {"error": message}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            owner = self.created[-1]["organization"] or "somebody"
            return 200, {"url": f"{self.endpoint}/{owner}/{self.created[-1]['name']}"}
        if path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(body)["content"].split("---\n")[1])["library_name"] == "transformers"
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: self.mode if name.endswith(".safetensors") else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith(".git/info/lfs/objects/batch"):
            href = f"{self.endpoint}/large/"
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": href + o["oid"]}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            files = self.committed.setdefault(repository, {})
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            url = f"{self.endpoint}/{repository}/commit/0"
            return 200, {"commitUrl": url, "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"not a part of the stand-in: {path}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on a port of this machine, and this process's client pointed at it, logged in with TOKEN."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # A store of large files has its own keys, in the address; the client asks for a public list on its own.
            if not self.path.startswith(("/large/", "/api/agent-harnesses")):
                state.tokens.append(self.headers.get("Authorization", ""))
            status, content = state.answer(self.path.partition("?")[0], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if "error" in content:
                self.send_header("X-Error-Message", content["error"])
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_any

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pushed_export_arrives_byte_for_byte(runs: Path, tmp_path: Path, hub: Hub) -> None:
    """By the command, which takes the address and the token from the environment."""
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [Path(sys.executable).with_name("fastcpt"), "export", runs / "cpt", "--output", tmp_path / "out", "--push", "me/cpt"],
        check=False, capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.endpoint}/me/cpt: ")
    assert hub.committed == {"me/cpt": contents(tmp_path / "out")}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.committed["me/cpt"].keys()
    assert hub.created == [{"name": "cpt", "organization": "me", "visibility": "private"}]
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    assert 'pipeline("text-generation", model="me/cpt")' in hub.committed["me/cpt"]["README.md"].decode()
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, on its own library
def test_weights_that_the_hub_wants_as_large_files(
    runs: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.mode = "lfs"
    assert export(str(runs / "cpt"), str(tmp_path / "out"), "cpt") == f"{hub.endpoint}/somebody/cpt"
    files = contents(tmp_path / "out")
    assert hub.committed == {"somebody/cpt": files}
    assert hub.large == {hashlib.sha256(files["model.safetensors"]).hexdigest(): files["model.safetensors"]}


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ({"/api/": (401, "Invalid credentials in Authorization header")}, r"does not accept the token \(401\); run `hf"),
        ({"/api/": (403, f"no rights for {TOKEN}")}, r"the token may not write there \(403\); use one that may"),
        ({"/commit/": (403, "Forbidden")}, r"the token may not write there \(403\)"),
        ({"/api/repos": (402, f"storage full for {TOKEN}")}, r"the hub answered 402, storage full for \*\*\*; mend that"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses(runs: Path, tmp_path: Path, hub: Hub, refusal: dict, message: str) -> None:
    hub.refusal = refusal
    with pytest.raises(UserError, match=message) as raised:
        export(str(runs / "cpt"), str(tmp_path / "out"), "me/cpt")
    shown = str(raised.value)
    assert TOKEN not in shown and "\n" not in shown and shown.startswith("--push me/cpt: ")
    # The export itself is done, and the way to go on is a command.
    assert shown.endswith(f"out is whole; then `hf upload --private me/cpt {tmp_path / 'out'}`")
    assert (tmp_path / "out" / "model.safetensors").exists() and not hub.committed.get("me/cpt")


def test_no_network(runs: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    with pytest.raises(UserError, match=r"no upload to http://127.0.0.1:1 \(ConnectError: .*refused.*\); mend"):
        export(str(runs / "cpt"), str(tmp_path / "out"), "me/cpt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no upload to .* \(OfflineModeIsEnabled"):
        exporting.upload(tmp_path / "out", "me/cpt")


def test_a_push_that_cannot_be_is_refused_before_the_work(
    runs: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/b/c", "../up", "me/cpt@main", "-x", ""):
        with pytest.raises(UserError, match="not a hub id; write it as NAME or ORGANISATION/NAME"):
            export(str(runs / "cpt"), str(tmp_path / "out"), name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(UserError, match="not logged in to the hub; run `hf auth login`, or set HF_TOKEN"):
        export(str(runs / "cpt"), str(tmp_path / "out"), "me/cpt")
    assert not (tmp_path / "out").exists() and not hub.tokens


def test_an_output_that_exists_is_refused_and_nothing_is_pushed(runs: Path, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="exists; name a new folder"):
        export(str(runs / "cpt"), str(tmp_path / "out"), "me/cpt")
    assert not hub.tokens

"""What comes from strangers runs no code, and names no file outside of its folder that would be read or written.

Opens are seen twice: by Python's audit hook, all of this process; by inotify, all of the folder outside, those of
libraries in other languages among them.
"""

import contextlib
import ctypes
import io
import json
import os
import pickle
import runpy
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from refusals import TENSORS_FILE, contents, recoded, sealed, with_index

from fastcpt import cli, integrity

STEP = "run/checkpoints/step-4"
INDEX = "hf/model.safetensors.index.json"
Commands = Callable[..., tuple[int, str]]


@pytest.fixture
def command(work: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    """command(words) -> (exit code, stderr)."""

    def run(words: str | list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(words.split() if isinstance(words, str) else words)
        return code, capsys.readouterr().err

    return run


# Code


class Evil:
    """Unpickled, it makes the folder `it-ran`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, ("it-ran", 0o777, True)


def in_zip(name: str) -> bytes:
    """As torch.save and others pack a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{name}/data.pkl", pickle.dumps(Evil()))
        file.writestr(f"{name}/version", "3\n")
    return buffer.getvalue()


def in_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Evil())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def in_array() -> bytes:
    """An array of objects in numpy's own format."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], object), allow_pickle=True)
    return buffer.getvalue()


def in_parquet() -> bytes:
    """A column of an extension type that older pyarrow unpickled."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Evil())}
    table = pa.table([pa.array(["text"])], pa.schema([pa.field("text", pa.string(), metadata=metadata)]))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


PICKLES = {
    "pickle 0": pickle.dumps(Evil(), 0),
    "pickle 2": pickle.dumps(Evil(), 2),
    "pickle 4": pickle.dumps(Evil(), 4),
    "torch": in_zip("archive"),
    "old torch": in_tar(),
}
ARRAY = in_array()
YAML = "!!python/object/apply:os.makedirs [it-ran]\n"
CODE = "import os\nos.makedirs('it-ran', exist_ok=True)\n"


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def in_checkpoint(name: str, content: bytes | str) -> Callable[[Path], None]:
    """A file of a checkpoint, all of whose hashes are made anew: whoever made it, made it whole."""

    def apply(folder: Path) -> None:
        written(f"{STEP}/{name}", content)(folder)
        path = folder / STEP / name
        hashes = [f"{value:016x}" for value in integrity.file_hashes(path, 1 << 20)]
        entry = {"bytes": path.stat().st_size, "hashes": hashes}
        sealed(f"{STEP}/manifest.json", lambda manifest: manifest["files"].update({name: entry}))(folder)

    return apply


def resealed(shards: str, name: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        written(f"{shards}/{name}", content)(folder)
        entry = {"bytes": len(content), "sha256": integrity.sha256_file(folder / shards / name)}
        sealed(f"{shards}/manifest.json", lambda manifest: manifest["files"].update({name: entry}))(folder)

    return apply


def unweighted(name: str, content: bytes) -> Callable[[Path], None]:
    """A Hugging Face model whose weights are in this file alone."""

    def apply(folder: Path) -> None:
        (folder / "hf" / "model.safetensors").unlink()
        written(f"hf/{name}", content)(folder)

    return apply


HF = "train --config run.yaml --run.output new --init.from hf"
EVAL = "eval run --data a=shards-val --seq-len 32 --tokens 64"
# name: (what is put there, the command that meets it, exit code)
HOSTILE: dict[str, tuple[Callable[[Path], None], str, int]] = {
    **{f"weights: {kind}": (unweighted("pytorch_model.bin", data), HF, 2) for kind, data in PICKLES.items()},
    **{f"weights.pt: {kind}": (unweighted("model.pt", data), "export hf --output out", 2) for kind, data in PICKLES.items()},
    **{f"weights as safetensors: {kind}": (written("hf/model.safetensors", data), HF, 2) for kind, data in PICKLES.items()},
    **{f"config.json: {kind}": (written("hf/config.json", data), HF, 2) for kind, data in PICKLES.items()},
    **{f"tokenizer.json: {kind}": (written("hf/tokenizer.json", data), "prep text.jsonl --tokenizer hf --output set", 2)
       for kind, data in PICKLES.items()},
    **{f"tensors of a checkpoint: {kind}": (in_checkpoint(TENSORS_FILE, data), "export run --output out", 2)
       for kind, data in PICKLES.items()},
    **{f"state of a checkpoint: {kind}": (in_checkpoint("state.json", data), "train --config run.yaml", 2)
       for kind, data in PICKLES.items()},
    **{f"manifest of a checkpoint: {kind}": (written(f"{STEP}/manifest.json", data), f"verify {STEP}", 2)
       for kind, data in PICKLES.items()},
    "pickles beside weights": (written("hf/training_args.bin", PICKLES["pickle 2"]), HF, 0),
    "pickle beside a checkpoint": (written(f"{STEP}/optimizer.pt", PICKLES["pickle 2"]), f"export {STEP} --output out", 2),
    "torch's .metadata": (written(f"{STEP}/.metadata", PICKLES["pickle 4"]), f"export {STEP} --output out", 2),
    "torch's .metadata in the manifest": (in_checkpoint(".metadata", PICKLES["pickle 4"]), f"export {STEP} --output out", 0),
    "a checkpoint of torch": (written("dcp/.metadata", PICKLES["pickle 4"]), "export dcp --output out", 2),
    "configuration in a checkpoint": (in_checkpoint("config.yaml", YAML), "export run --output out", 0),
    "tokenizer in a checkpoint": (in_checkpoint("tokenizer.json", PICKLES["pickle 2"]), "export run --output out", 2),
    "configuration of a run": (written("run/config.yaml", YAML), "report run --output page.html", 2),
    "configuration of a run, traced": (written("run/config.yaml", YAML), "inspect run --step 1", 2),
    "log of a run": (written("run/metrics.jsonl", PICKLES["pickle 0"]), "report run --output page.html", 2),
    "configuration": (written("run.yaml", YAML), "train --config run.yaml", 2),
    "a setting": (written("run.yaml", f"model: {YAML}"), "train --config run.yaml", 2),
    "a setting's class": (written("run.yaml", "model:\n  class_path: stranger.Class\n"), "train --config run.yaml", 2),
    "a source's class": (written("run.yaml", "data:\n  train:\n  - class_path: stranger.Class\n"), "train --config run.yaml", 2),
    "a source that is a class": (written("run.yaml", "data:\n  train: [stranger.Class]\n"), "plan --config run.yaml", 2),
    "a setting's class on the command line": (written("x", ""), f"{HF} --model.class_path stranger.Class", 2),
    "auto_map": (recoded("hf/config.json", lambda c: c.update(auto_map={"AutoConfig": "stranger.Class"})), HF, 2),
    "trust_remote_code": (recoded("hf/config.json", lambda c: c.update(trust_remote_code=True)), HF, 0),
    "code beside a model": (written("hf/modeling_gpt_neox.py", CODE), HF, 0),
    "tokenizer's template": (written("hf/tokenizer_config.json", json.dumps({"chat_template": "{{ ''.__class__.mro() }}"})), HF, 0),
    "manifest of shards": (written("shards-val/manifest.json", PICKLES["pickle 2"]), EVAL, 2),
    "bytes of tokens": (resealed("shards-val", "token_bytes.npy", ARRAY), EVAL, 2),
    "tokenizer of shards": (resealed("shards-val", "tokenizer.json", PICKLES["pickle 2"]), "inspect shards-val --decode 1", 2),
    "ledger": (resealed("shards-val", "ledger.parquet", PICKLES["pickle 2"]), "inspect shards-val", 2),
    "index of shards": (written("shards-val/shard-00000.idx", PICKLES["pickle 2"]), "verify shards-val", 2),
    "array of tokens": (written("a.npy", ARRAY), "convert a.npy --source olmo --tokenizer text.json --output set", 2),
    "index of Megatron": (written("tokens.idx", PICKLES["pickle 2"]), "convert tokens.bin --source megatron --tokenizer text.json --output set", 2),
    "text": (written("a.jsonl", PICKLES["pickle 0"] + b"\n"), "prep a.jsonl --workers 1 --tokenizer text.json --output set", 2),
    "type of a column": (written("a.parquet", in_parquet()), "prep a.parquet --workers 1 --tokenizer text.json --output set", 0),
    "plan of preparation": (written("set.partial/plan.json", PICKLES["pickle 2"]), "prep text.jsonl --workers 1 --tokenizer text.json --output set", 2),
}  # fmt: skip


def test_there_are_fifty() -> None:
    assert len(HOSTILE) >= 50


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_stranger_runs(name: str, work: Path, command: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    put, words, expected = HOSTILE[name]
    (work / "stranger.py").write_text(CODE)
    monkeypatch.syspath_prepend(work)
    put(work)
    code, errors = command(words)
    assert not (work / "it-ran").exists()
    assert code == expected, errors


def test_the_traps_work(work: Path) -> None:
    """What would run it, does."""
    import yaml

    for load in (
        lambda: pickle.loads(PICKLES["pickle 0"]),
        lambda: pickle.loads(PICKLES["pickle 4"]),
        lambda: np.load(work / "a.npy", allow_pickle=True),
        lambda: torch.load(work / "a.pt", weights_only=False),
        lambda: yaml.unsafe_load(YAML),
        lambda: runpy.run_path(str(work / "stranger.py")),
    ):
        (work / "stranger.py").write_text(CODE)
        (work / "a.npy").write_bytes(ARRAY)
        (work / "a.pt").write_bytes(PICKLES["torch"])
        with contextlib.suppress(Exception):  # of what is no tensor after all
            load()
        assert (work / "it-ran").exists()
        (work / "it-ran").rmdir()


# Paths


class Opens:
    """The real paths that this process opens, makes, renames or removes while `on`."""

    def __init__(self) -> None:
        self.on, self.paths = False, set()
        sys.addaudithook(self._hook)  # for good: there is no way to take it back

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"):
            self.on = False
            self.paths |= {os.path.realpath(path) for path in arguments[:2] if isinstance(path, str | bytes | Path)}
            self.on = True


OPENS = Opens()


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The events of inotify in a folder: opened, read, changed, made, removed, of whatever library."""
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = library.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0 and library.inotify_add_watch(descriptor, os.fsencode(folder), 0xFFF) >= 0
    events: list[int] = []
    try:
        yield events
        while True:
            events.append(struct.unpack_from("iI", os.read(descriptor, 1 << 16))[1])
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def spellings(outside: Path, name: str) -> list[str]:
    """Names for the file `name` of a folder outside, beside the current folder's parent or linked from a folder."""
    near = f"../../{outside.name}/{name}"
    return [
        near, f"../{near}", f"./{near}", f"x/../../../{outside.name}/{name}", f"{outside}/{name}", f"/{outside}/{name}",
        f"link/{name}", f"./link/{name}", "one", f"./{name}", f"../work/{name}", name + "\0", f"{near}\0.bin", "x" * 300,
        ".", "..", "", "/", "../", near.replace("/", "\\"), f"..\\..\\{outside.name}\\{name}", f"C:\\{name}", f"\\\\host\\{name}",
        near.replace("../", "%2e%2e%2f"), near.replace("/", "%2f"), near.replace("..", "%252e%252e"),
        near.replace("..", "\uff0e\uff0e"), near.replace("..", "\u2025"), near.replace("/", "\uff0f"), near.replace("/", "\u2215"),
        f"~/{name}", f"$OUTSIDE/{name}", f"file://{outside}/{name}", f"{near}\n", f" {near}", f"-{near}", "\x1b[2J" + near,
    ]  # fmt: skip


@contextlib.contextmanager
def guarded(work: Path, outside: Path, usual: set[str]) -> Iterator[None]:
    """Nothing outside of `work` is touched, but for `usual`."""
    before = contents(outside)
    OPENS.paths.clear()
    with watched(outside) as events:
        OPENS.on = True
        try:
            yield
        finally:
            OPENS.on = False
    assert not events
    strange = {path for path in OPENS.paths - usual if path != str(work) and not path.startswith(f"{work}/")}
    assert not strange, strange
    assert contents(outside) == before


def renamed(where: str, key: str, old: str) -> Callable[[Path, str], None]:
    """Puts a name in the place of `old` in a manifest, whose own hash is made anew."""

    def put(work: Path, name: str) -> None:
        def anew(manifest: dict[str, Any]) -> None:
            if key == "pairs":
                manifest["pairs"][0]["name"] = name
            else:
                manifest["files"][name] = manifest["files"].pop(old)

        sealed(where, anew)(work)

    return put


def in_index(work: Path, name: str) -> None:
    recoded(INDEX, lambda index: index["weight_map"].update({"embed_out.weight": name}))(work)


def in_ledger(work: Path, name: str) -> None:
    table = pq.read_table(work / "shards" / "ledger.parquet")
    column = table.schema.get_field_index("input")
    table = table.set_column(
        column, table.schema.field(column), pa.array([name] * len(table), table.schema.field(column).type)
    )
    pq.write_table(table, work / "ledger")
    resealed("shards", "ledger.parquet", (work / "ledger").read_bytes())(work)


def in_group(work: Path, name: str) -> None:
    (work / "group.jsonl").write_text(json.dumps({"text": "a", "to": name}) + "\n")


# name: (files of the folder outside, the name of one, the file that is changed, how, commands, exit codes)
PLACES: dict[str, tuple[str, str, str, Callable[[Path, str], None], list[str], set[int]]] = {
    "pair": ("shards", "shard-00000", "shards/manifest.json", renamed("shards/manifest.json", "pairs", ""),
             ["verify shards", "train --config run.yaml --run.output new"], {2}),
    "file of a set": ("shards", "tokenizer.json", "shards/manifest.json", renamed("shards/manifest.json", "files", "tokenizer.json"),
                      ["verify shards"], {2}),
    "file of a checkpoint": (STEP, "state.json", f"{STEP}/manifest.json", renamed(f"{STEP}/manifest.json", "files", "state.json"),
                             [f"verify {STEP}", f"export {STEP} --output out"], {2}),
    "index": ("hf", "model-1.safetensors", INDEX, in_index, ["eval hf --data a=shards --seq-len 32", HF], {2}),
    "pair of a set that is traced": ("shards", "shard-00000", "shards/manifest.json", renamed("shards/manifest.json", "pairs", ""),
                                     ["inspect run --step 1 --decode 1"], {2}),
    "file of a run's newest checkpoint": (STEP, TENSORS_FILE, f"{STEP}/manifest.json",
                                          renamed(f"{STEP}/manifest.json", "files", TENSORS_FILE), ["inspect run --step 1", "export run --output out"], {0}),
    "input of a ledger": ("shards", "manifest.json", "shards/ledger.parquet", in_ledger, ["inspect run --step 1", "inspect shards"], {0}),
    "group": ("shards", "manifest.json", "group.jsonl", in_group,
              ["prep group.jsonl --group-key to --workers 1 --tokenizer text.json --output set"], {0, 2}),
}  # fmt: skip


def test_there_are_two_hundred_paths() -> None:
    assert len(PLACES) * len(set(spellings(Path("/a"), "b"))) >= 200


@pytest.mark.parametrize("place", PLACES)
def test_no_name_leads_outside(
    place: str, work: Path, tmp_path: Path, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside lies the very file that is named, so that an open would succeed and its hash would be right."""
    source, name, changed, put, commands, codes = PLACES[place]
    in_group(work, "plain")
    with_index(work)
    outside = tmp_path / "outside"
    shutil.copytree(work / source, outside)
    monkeypatch.setenv("OUTSIDE", str(outside))
    original = (work / changed).read_bytes()

    def all_commands(expected: set[int]) -> None:
        for words in commands:
            code, errors = command(words)
            assert code in expected and "Traceback" not in errors, (words, errors)
            for made in ("new", "out", "set", "set-plain", "set.partial"):
                shutil.rmtree(work / made, ignore_errors=True)

    OPENS.paths.clear()
    OPENS.on = True
    all_commands({0, 2})
    OPENS.on = False
    usual = {path for path in OPENS.paths if not path.startswith(f"{tmp_path}/")}
    if "checkpoint" not in place:  # whose folder may hold nothing else, not even a link
        folder = (work / changed).parent
        (folder / "link").symlink_to(outside)
        for each in outside.iterdir():
            if each.name.startswith(name):
                (folder / f"one{each.name.removeprefix(name)}").symlink_to(each)
    for spelling in spellings(outside, name):
        (work / changed).write_bytes(original)
        put(work, spelling)
        with guarded(work, outside, usual):
            all_commands(codes)


def test_no_name_of_a_set_in_a_log_becomes_a_files(work: Path, tmp_path: Path, command: Commands) -> None:
    """Each set is drawn; figures have names of their own."""
    outside = tmp_path / "outside"
    outside.mkdir()
    assert command("report run --output first.html")[0] == 0  # what drawing opens, it has now opened
    log = work / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in (line for line in lines if "eval" in line):
        line["eval"] = dict.fromkeys([f"../{outside.name}/a", f"{outside}/a"], line["eval"]["text"])
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    OPENS.paths.clear()
    OPENS.on = True
    command("report run --output second.html")
    OPENS.on = False
    with guarded(work, outside, {path for path in OPENS.paths if not path.startswith(f"{tmp_path}/")}):
        assert command("report run --output page.html")[0] == 0
    assert {path.suffix for path in (work / "page-figures").iterdir()} == {".png", ".pdf"}


def test_the_guard_sees_what_is_opened(work: Path, tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    def opened(path: Path) -> None:
        with contextlib.suppress(SafetensorError), safe_open(path, "pt"):
            pass

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"x")
    for touch in (
        lambda: (outside / "a").read_bytes(),
        lambda: os.close(os.open(f"{work}/../outside/a", os.O_RDONLY)),
        lambda: (outside / "b").touch(),
        lambda: opened(outside / "a"),
    ):
        with pytest.raises(AssertionError), guarded(work, outside, set()):
            touch()

"""`prep` on a Ray cluster that loses a node, and with inputs and output on a real S3 server: the bytes of a local run."""

import functools
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fastcpt import UserError
from fastcpt.data_prep import engines, inputs, pairs, pretokenize, store, tasks
from fastcpt.data_prep.pretokenize import prep

ray = pytest.importorskip("ray")
pytest.importorskip("s3fs")
pytest.importorskip("moto")

WORDS = ["alpha", "beta", "gamma", "日本語", "  ", "\n", "<|endoftext|>", "def f(x):", "0.5"]


def make_corpus(folder: Path) -> None:
    """Files of every kind that is divided in another way, with duplicates and bad lines among them."""
    import orjson

    def line(number: int) -> bytes:
        text = " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 12 + number % 7)) + str(number % 90)
        return orjson.dumps({"text": text, "meta": {"source": ("web", "books")[number % 2]}}) + b"\n"

    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(map(line, range(120))) + b"{broken\n")
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(map(line, range(100, 160)))))
    rows = {"text": [f"row {number} {'x' * (number % 13)}" for number in range(60)], "meta": [{"source": "web"}] * 60}
    pq.write_table(pa.table(rows), folder / "c.parquet", row_group_size=9)


@pytest.fixture
def run(byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    monkeypatch.setattr(inputs, "TASK_BYTES", 900)
    return functools.partial(
        prep, tokenizer=str(byte_tokenizer), quiet=True, on_error="skip", val_fraction=0.2, shard_tokens=900
    )


def tree(folder: Path) -> dict[str, str]:
    """The hash of each file of a set and of its sibling sets."""
    return {
        f"{each.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for each in sorted(folder.parent.glob(folder.name + "*"))
        for file in each.iterdir()
    }


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of a head without CPUs and two nodes of one CPU, each its own raylet."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
    made.nodes = [made.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    ray.init(address=made.address, log_to_driver=False)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def test_ray_writes_the_bytes_of_a_local_run_though_a_node_is_killed(
    tmp_path: Path, run: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(tmp_path / "in")
    (tmp_path / "local").mkdir()
    (tmp_path / "ray").mkdir()
    run([str(tmp_path / "in")], output=tmp_path / "local" / "out", workers=1, dedup=True)
    total = len(inputs.make_tasks(inputs.find_inputs([str(tmp_path / "in")])))
    killed: list[int] = []
    add = pretokenize.Meter.add

    def kill_a_node(meter: Any, size: int, tokens: int = 0) -> None:
        add(meter, size, tokens)
        if not killed:  # after the first result
            killed.append(len(list((tmp_path / "ray" / "out.partial" / "tasks").glob("0*.json"))))
            cluster.remove_node(cluster.nodes[0], allow_graceful=False)  # asserts that its processes are gone

    monkeypatch.setattr(pretokenize.Meter, "add", kill_a_node)
    run([str(tmp_path / "in")], output=tmp_path / "ray" / "out", engine="ray", dedup=True)
    assert total > 20 and killed[0] < total - 10
    assert tree(tmp_path / "ray" / "out") == tree(tmp_path / "local" / "out")
    # A user's mistake on a node reads as it does here, and an address where nobody answers is one.
    with pytest.raises(UserError, match=r"a\.jsonl:121 \(byte \d+\): broken JSON"):
        run([str(tmp_path / "in")], output=tmp_path / "failed", engine="ray", on_error="fail")


def test_a_node_that_cannot_see_the_output_says_so(tmp_path: Path, byte_tokenizer: Path) -> None:
    job = pretokenize.Job(str(tmp_path / "elsewhere"), None, "text", None, 0.0, "fail", "gigatoken")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"elsewhere: not to be seen from .*; put --output where all nodes can see it"):
        tasks._tools(job)


def test_no_cluster_at_the_address() -> None:
    with pytest.raises(UserError, match="no cluster answers there"), engines.on_ray("127.0.0.1:1", None):
        pass


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server, a process of its own on the loopback interface; credentials in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import moto.server; moto.server.main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kept = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    import fsspec

    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    server.terminate()
    server.wait()
    os.environ.clear()
    os.environ.update(kept)


def upload(folder: Path, url: str) -> None:
    for file in sorted(folder.iterdir()):
        store.write_bytes(store.join(url, file.name), file.read_bytes())


def download(url: str, folder: Path) -> None:
    """Every object below a prefix and its sibling sets."""
    for address in store.find(url + "*/*") or ():
        directory, name = store.split(address)
        local = folder / store.split(directory)[1]
        local.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(store.read_bytes(address) or b"")


def test_s3_holds_the_bytes_of_a_local_run(tmp_path: Path, run: Any, s3: str, interrupt: Any) -> None:
    """Inputs and output there; stopped in the tasks and in the merge, and started again; refused where it must be."""
    make_corpus(tmp_path / "in")
    upload(tmp_path / "in", f"{s3}/corpus")
    (tmp_path / "local").mkdir()
    run([str(tmp_path / "in")], output=tmp_path / "local" / "out", workers=1, dedup=True)
    again = functools.partial(run, [f"{s3}/corpus"], output=f"{s3}/sets/out", workers=1, dedup=True)
    for module, name, call in ((tasks, "write_record", 3), (pairs, "write_pair", 2)):
        with pytest.raises(interrupt(module, name, call)):
            again()
        assert store.read_bytes(f"{s3}/sets/out/manifest.json") is None
    with pytest.raises(UserError, match=r"out\.partial: holds an unfinished run that differs in --val-fraction"):
        again(val_fraction=0.3)
    manifests = again()
    assert [manifest["path"] for manifest in manifests] == [f"{s3}/sets/out", f"{s3}/sets/out-val"]
    download(f"{s3}/sets/out", tmp_path / "remote")
    assert tree(tmp_path / "remote" / "out") == tree(tmp_path / "local" / "out")
    assert not store.has_files(f"{s3}/sets/out.partial")
    with pytest.raises(UserError, match="sets/out: exists already"):
        again()
    # One from many patterns, from here to there and the other way, in processes.
    shutil.rmtree(tmp_path / "remote")
    run([f"{s3}/corpus/*.jsonl", f"{s3}/corpus/b.jsonl.zst", f"{s3}/corpus/c.parquet"], output=tmp_path / "remote" / "out",
        workers=2, dedup=True)  # fmt: skip
    assert tree(tmp_path / "remote" / "out") == tree(tmp_path / "local" / "out")


def test_a_set_that_is_there_is_never_written_over(tmp_path: Path, run: Any, s3: str) -> None:
    """Nor one of its siblings, whose names are known when a document asks for them; and a set is none of its siblings."""
    make_corpus(tmp_path / "in")
    options = {"output": f"{s3}/kept/out", "workers": 1, "group_key": "meta.source"}
    store.write_bytes(f"{s3}/kept/out-web/manifest.json", b"of another run")
    assert store.has_files(f"{s3}/kept/out-web") and not store.has_files(f"{s3}/kept/out")
    with pytest.raises(UserError, match="kept/out-web: exists already"):
        run([str(tmp_path / "in")], **options)
    assert store.find(f"{s3}/kept/out-web").keys() == {f"{s3}/kept/out-web/manifest.json"}  # type: ignore[union-attr]
    store.remove_folder(f"{s3}/kept/out-web")
    names = [store.split(manifest["path"])[1] for manifest in run([str(tmp_path / "in")], **options)]
    assert names == ["out-books", "out-books-val", "out-web", "out-web-val"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3://no-such-bucket/x.jsonl"], r"s3://no-such-bucket/x\.jsonl: .*check the"),
        (["s3://bucket/nothing"], r"s3://bucket/nothing: no such file or folder"),
        (["nosuch://bucket/x.jsonl"], r"nosuch://bucket/x\.jsonl: .*local paths need nothing"),
    ],
)
def test_addresses_that_do_not_answer(tmp_path: Path, run: Any, s3: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(arguments, output=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_an_object_that_changed_is_noticed(tmp_path: Path, run: Any, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, between two runs and during one."""
    store.write_bytes(f"{s3}/one/a.jsonl", b'{"text": "aaaa"}\n' * 100)
    original = tasks.run_task

    def change(task: Any, job: Any) -> Any:
        if task.index == 1:
            store.write_bytes(f"{s3}/one/a.jsonl", b'{"text": "bbbb"}\n' * 100)
        return original(task, job)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"a\.jsonl: changed while it was read"):
        patch.setattr(pretokenize, "run_task", change)
        run([f"{s3}/one"], output=tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"differs in inputs \(a\.jsonl: 1,700 bytes of version .* then"):
        run([f"{s3}/one"], output=tmp_path / "out", workers=1)

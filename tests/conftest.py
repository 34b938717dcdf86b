"""What several tests need: small shard sets written by the real writer, small configurations, several processes."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Without a GPU, kernels are decorated for Triton's interpreter, which is decided once, when they are imported. The
# variable is then taken back: processes that tests start, and operators outside `triton_device`, run as users' do.
INTERPRET = not torch.cuda.is_available()
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"
import triton

from fastcpt.kernels import launch

for file in sorted((Path(__file__).parent.parent / "kernels").glob("[a-z]*.py")):
    importlib.import_module(f"fastcpt.kernels.{file.stem}")
os.environ.pop("TRITON_INTERPRET", None)
launch.INTERPRETED = False

from fastcpt import config as configuration
from fastcpt.shards import PairWriter, ShardSet, tokenizer_fingerprint, write_manifest

EOD = 0


def token_text(token: int) -> str:
    """The text of an id: of 1 to 7 bytes, the end-of-document token of none."""
    return "" if token == EOD else f"{token:x}".rjust(1 + token % 7, "t")


def tokenizer_json(vocab_size: int) -> bytes:
    vocabulary = {f"<{token}>" if token == EOD else token_text(token): token for token in range(vocab_size)}
    content = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    return json.dumps({**content, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}}).encode()


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., ShardSet]:
    """write_shards(folder, documents, pairs=2, vocab_size=64, dtype=np.uint16) -> the set, in about equal pairs.

    documents: lists of ids without the end-of-document token 0, which is appended.
    """

    def write(
        folder: Path, documents: Sequence[Sequence[int]], pairs: int = 2, vocab_size: int = 64, dtype: Any = np.uint16
    ) -> ShardSet:
        folder.mkdir(parents=True)
        content = tokenizer_json(vocab_size)
        (folder / "tokenizer.json").write_bytes(content)
        token_bytes = np.array([len(token_text(token)) for token in range(vocab_size)], np.uint16)
        np.save(folder / "token_bytes.npy", token_bytes)
        entries = []
        for number in range(pairs):
            part = documents[number * len(documents) // pairs : (number + 1) * len(documents) // pairs]
            writer = PairWriter(folder, f"shard-{number:05}", np.dtype(dtype))
            for document in part:
                tokens = np.array([*document, EOD], dtype)
                writer.write(tokens, np.array([len(tokens)], np.int32))
            entries.append(writer.close())
        write_manifest(
            folder,
            tokenizer={
                "fingerprint": tokenizer_fingerprint(content),
                "vocab_size": vocab_size,
                "eod": EOD,
                "eod_token": "<0>",
            },
            dtype=np.dtype(dtype),
            text_bytes=int(sum(token_bytes[list(document)].sum() for document in documents)),
            pairs=entries,
            files=["tokenizer.json", "token_bytes.npy"],
        )
        return ShardSet(folder)

    return write


@pytest.fixture(scope="session")
def random_documents() -> Callable[..., list[list[int]]]:
    """random_documents(seed, count, longest=40, vocab_size=64): ragged, an empty one now and then."""

    def make(seed: int, count: int, longest: int = 40, vocab_size: int = 64) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        lengths = generator.integers(0, longest + 1, count)
        return [generator.integers(1, vocab_size, length).tolist() for length in lengths]

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., configuration.Config]:
    """tiny_config(output, **sections): a run of 5 steps of a tiny model; a section's dict changes its fields."""

    def make(output: Path | str = "run", **sections: dict[str, Any]) -> configuration.Config:
        defaults: dict[str, dict[str, Any]] = {
            "model": {"layers": 2, "width": 24, "heads": 3, "vocab_size": 64},
            "init": {},
            "data": {"train": [configuration.Source(name="new", path="new", weight=1.0)], "seq_len": 16},
            "train": {
                "tokens": configuration.Count(5 * 6 * 16),
                "batch_tokens": configuration.Count(6 * 16),
                "micro_batch": 4,
                "compile": False,
                "precision": "fp32",
            },
            "optim": {"lr": 1e-3},
            "schedule": {},
            "run": {"output": str(output), "tensorboard": False},
        }
        classes = {
            "model": configuration.Model,
            "init": configuration.Init,
            "data": configuration.Data,
            "train": configuration.Train,
            "optim": configuration.Optim,
            "schedule": configuration.Schedule,
            "run": configuration.Run,
        }
        return configuration.Config(
            **{name: cls(**{**defaults[name], **sections.get(name, {})}) for name, cls in classes.items()}
        )

    return make


class Alive(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, those left out that were there before."""

    def __init__(self, before: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in before}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        results = function(*arguments, **(options or {}))
        for tensor in tree_leaves(results):
            real = isinstance(tensor, Tensor) and not tensor.is_meta
            storage = tensor.untyped_storage() if real else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return results

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.fixture
def alive_bytes() -> type[Alive]:
    """with alive_bytes(tensors there before) as alive: ...; alive.peak"""
    return Alive


class Interrupted(BaseException):
    """As KeyboardInterrupt, but certainly ours."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, int], type[BaseException]]:
    """interrupt(module, name, call) -> what the call-th call of a module's function raises, once."""

    def arm(module: Any, name: str, call: int) -> type[BaseException]:
        calls, original = [0], getattr(module, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                raise Interrupted
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, wrapped)
        return Interrupted

    return arm


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json` of byte-level BPE without merges: an id a byte, and one that ends documents."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shard sets, a run, its export and token files, as `refusals.workspace` makes it with the commands."""
    import refusals

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        refusals.workspace(folder)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, which is the current folder, without a network, a login or torchrun."""
    copy = Path(shutil.copytree(made, tmp_path / "work"))
    monkeypatch.chdir(copy)
    for name in ("HF_TOKEN", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return copy


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """run_ranks(script, size, *arguments) -> what each process printed, of `size` processes in one gloo group.

    The script reads its own rank and the world from the environment, as under torchrun; a store in a file and not on
    a port joins them, so that tests side by side cannot meet.
    """
    join = (
        "import os, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv.pop(1),"
        " rank=int(os.environ['RANK']), world_size=int(os.environ['WORLD_SIZE']))\n"
    )

    # A process whose interpreter ends while gloo's threads still live (something holds a group) may abort.
    leave = "\nif dist.is_initialized():\n    dist.destroy_process_group()\nsys.stdout.flush()\nos._exit(0)\n"

    def run(script: str, size: int, *arguments: Any) -> list[str]:
        store = tmp_path / "store"
        store.unlink(missing_ok=True)  # of an earlier call
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", join + script + leave, str(store), *map(str, arguments)],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, outputs):
            assert process.returncode == 0, errors
        return [printed for printed, _ in outputs]

    return run


def _round_to_nearest(
    values: np.ndarray, source: Any, target: Any, mode: Any, convert: Any = triton.runtime.interpreter._convert_float
) -> np.ndarray:
    """Between fp32 and bf16 (as uint16) as the hardware does it; the interpreter itself truncates a plain cast."""
    if (source, target) == (triton.language.float32, triton.language.bfloat16):
        numbers = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (triton.language.bfloat16, triton.language.float32):
        return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
    return convert(values, source, target, mode)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device on which operators launch their Triton kernels: a GPU, or the CPU with the interpreter.

    `torch.empty` is filled with NaN meanwhile, so that what a kernel leaves unwritten is seen.
    """
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(launch, "INTERPRETED", True)
        monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", _round_to_nearest)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield torch.device("cpu" if INTERPRET else "cuda")
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each Triton kernel was launched, by name, from here on."""
    counts: Counter[str] = Counter()
    kind = triton.runtime.interpreter.InterpretedFunction if INTERPRET else triton.runtime.JITFunction
    run = kind.run

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        counts[kernel.fn.__name__] += 1
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return counts


@pytest.fixture
def check_budget(record_property: Callable[[str, Any], None]) -> Callable[..., float]:
    """check_budget(name, ours, plain, exact, terms=1, scale=None, roundings=1) -> the worst error over its limit, at most 1.

    The error budget of a kernel (as in apple/ml-cross-entropy's tests), element by element: its error against the
    exact value is at most that of plain torch in the same dtype, plus the roundings of the result to its dtype, plus
    the error of a sum of `terms` fp32 numbers in any order (Higham: terms * 2^-24, times their size `scale`).

    ours, plain: results in the dtype under test; exact: in float64; scale: a number or a tensor like the result, the
    sum of the sizes of the terms; by default the largest exact value.

    name: "kernel: result"; the worst of each is printed at the end of the test run.
    """

    def check(
        name: str,
        ours: Tensor,
        plain: Tensor,
        exact: Tensor,
        terms: int = 1,
        scale: Tensor | float | None = None,
        roundings: int = 1,
    ) -> float:
        assert exact.dtype == torch.float64 and ours.shape == exact.shape and ours.dtype == plain.dtype, name
        assert torch.isfinite(ours).all(), f"{name}: not finite"
        size = exact.abs().max() if scale is None else scale
        rounding = roundings * torch.finfo(ours.dtype).eps / 2
        limit = (plain.double() - exact).abs() + rounding * exact.abs() + terms * 2.0**-24 * size
        error = (ours.double() - exact).abs()
        ratio = torch.where(error == 0, 0.0, error / limit)
        worst = int(ratio.argmax())
        assert ratio.max() <= 1, (
            f"{name}: element {worst} of {tuple(ours.shape)} is {ours.flatten()[worst]}, plain torch has "
            f"{plain.flatten()[worst]}, exact is {exact.flatten()[worst]}; the error is {ratio.max():.3g} of its limit"
        )
        record_property("budget", (name, float(ratio.max()), float(error.max() / exact.abs().max().clamp_min(1e-300))))
        return float(ratio.max())

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The worst errors of each kernel, over all tests that ran."""
    worst: dict[str, tuple[int, float, float]] = {}
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == "budget":
                name, ratio, error = value
                checks, *seen = worst.get(name, (0, 0.0, 0.0))
                worst[name] = (checks + 1, max(seen[0], ratio), max(seen[1], error))
    if worst:
        terminalreporter.section("kernels: error against float64, over the budget and over the largest value")
        for name, (checks, ratio, error) in sorted(worst.items()):
            terminalreporter.write_line(f"{name:44} {checks:5} checks  {ratio:5.2f} of the budget  {error:.1e}")

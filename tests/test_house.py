"""The order of the house: who may import whom, names that would shadow, what a wheel holds, and no pickle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"fastcpt": "fastcpt", "kernels": "fastcpt.kernels", "data_prep": "fastcpt.data_prep", "benchmarks": "fastcpt.benchmarks"}  # fmt: skip
FILES = {
    f"{package}.{path.stem}" if path.stem != "__init__" else package: path
    for folder, package in ROOMS.items()
    for path in sorted((ROOT / folder).glob("*.py"))
}
TRAINING = {"fastcpt.cli", "fastcpt.demo", "fastcpt.sweep"} | {
    f"fastcpt.benchmarks.{name}" for name in ("train_rivals", "overheads_run")
}
# Modules that only `import X` inside a function may name: they are heavy, or not everybody has them.
OPTIONAL = {
    "jsonargparse",
    "yaml",
    "rich",
    "wandb",
    "ray",
    "flash_attn",
    "flash_attn_interface",
    "pyarrow",
    "zstandard",
    "gigatoken",
    "transformers",
}


def imports(path: Path, lazy: bool) -> set[str]:
    """Modules that a file imports, by full name; lazy=False leaves out those inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update({f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def ours(path: Path) -> set[str]:
    """Our own modules that a file imports, functions included."""
    return {name for name in imports(path, lazy=True) if name in FILES} - {"fastcpt"}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    path, used = FILES[module], ours(FILES[module])
    outside = {name.partition(".")[0] for name in imports(path, lazy=True)} - {"fastcpt"} - set(sys.stdlib_module_names)
    assert not {"tests", "kernels", "data_prep", "benchmarks"} & outside
    if module.startswith("fastcpt.kernels"):
        assert outside <= {"torch", "triton"} and all(name.startswith("fastcpt.kernels") for name in used)
    if module in ("fastcpt.integrity", "fastcpt.blocks", "fastcpt.shards", "fastcpt.permutation"):
        assert outside <= {"numpy"} and used <= {"fastcpt.integrity", "fastcpt.blocks"}
    if module.startswith("fastcpt.data_prep"):
        assert not {"torch", "transformers"} & outside
        # progress: one bar for preparation and for training; it imports nothing of ours.
        allowed = {"fastcpt.shards", "fastcpt.integrity", "fastcpt.progress"}
        assert all(name.startswith("fastcpt.data_prep") or name in allowed for name in used)
    if module == "fastcpt.progress":
        assert outside <= {"rich"} and not used
    if module == "fastcpt.model":
        kernels = {f"fastcpt.kernels.{name}" for name in ("gelu", "layer_norm", "qkv_rotary")}
        rest = {f"fastcpt.{name}" for name in ("config", "embedding", "execution", "fp8", "loss", "parallel")}
        assert used == rest | kernels
    if module == "fastcpt.data":
        assert used == {"fastcpt.shards", "fastcpt.permutation"}
    if module not in TRAINING:
        assert "fastcpt.train" not in used
        assert module.startswith("fastcpt.benchmarks") or "fastcpt.benchmarks" not in used
    if module == "fastcpt.train":
        assert not {"fastcpt.cli", "fastcpt.demo"} & used and not any("data_prep" in name for name in used)


def test_there_is_no_cycle() -> None:
    graph = {module: ours(path) for module, path in FILES.items()}
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"cycle: {' -> '.join((*trail, module))}"
        if module in state:
            return
        state[module] = 1
        for used in graph[module]:
            visit(used, (*trail, module))
        state[module] = 2

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in FILES if not m.startswith(("fastcpt.data_prep", "fastcpt.benchmarks"))])
def test_optional_packages_are_imported_late(module: str) -> None:
    assert not {name.partition(".")[0] for name in imports(FILES[module], lazy=False)} & OPTIONAL


def test_training_imports_without_the_optional_packages() -> None:
    """torch, triton, numpy, safetensors and huggingface_hub are enough for model, data and train."""
    blocked = OPTIONAL | {"rich", "tensorboard", "tokenizers"}
    script = (
        "import sys\n"
        f"for name in {sorted(blocked)!r}: sys.modules[name] = None\n"
        "import fastcpt.train, fastcpt.model, fastcpt.data, fastcpt.hf, fastcpt.checkpoint\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("path", [p for f in [*ROOMS, "tests"] for p in sorted((ROOT / f).glob("*.py"))], ids=str)
def test_no_file_shadows_a_module(path: Path) -> None:
    """torchrun and `python FILE` put a file's folder first on sys.path, where its neighbours answer to their names."""
    well_known = {"torch", "triton", "numpy", "datasets", "evaluate", "tokenizers", "wandb", "ray", "rich", "yaml"}
    assert path.stem not in (set(sys.stdlib_module_names) | well_known | OPTIONAL)


PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUN_WHAT_THEY_READ = {"eval", "exec", "os.system", "os.popen", "torch.jit.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"}  # fmt: skip
FORBIDDEN = {"trust_remote_code": True, "weights_only": False, "allow_pickle": True, "shell": True}


def dangers(text: str) -> Iterator[int]:
    """Lines that unpickle, or run code that comes from elsewhere."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if PICKLES & {name.partition(".")[0] for name in names}:
                yield node.lineno
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            values = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            wrong = any(values.get(key) is value for key, value in FORBIDDEN.items())
            unsaid = name == "torch.load" and values.get("weights_only") is not True
            if name in RUN_WHAT_THEY_READ or wrong or unsaid:
                yield node.lineno


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    for path in FILES.values():
        assert list(dangers(path.read_text())) == [], path


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "import a, joblib", "torch.load(f)", "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=w)", "yaml.load(f, Loader)", "yaml.unsafe_load(f)", "f(trust_remote_code=True)",
        "np.load(f, allow_pickle=True)", "eval(x)", "exec(x)", "subprocess.run(x, shell=True)", "shelve.open(x); import shelve",
    ],
)  # fmt: skip
def test_what_would_is_seen(text: str) -> None:
    assert list(dangers(text))


def test_files_and_functions_stay_small() -> None:
    for module, path in FILES.items():
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (module, node.name) != ("fastcpt.train", "_train"):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"


def test_the_wheel_has_one_top_level(tmp_path: Path) -> None:
    """And every module is in it, under its imported name."""
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), "."],
        cwd=_copy(tmp_path / "source"), check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"fastcpt"}
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for folder, package in ROOMS.items()
        for path in (ROOT / folder).glob("*.py")
    }
    presets = {f"fastcpt/presets/{path.name}" for path in (ROOT / "fastcpt" / "presets").glob("*.yaml")}
    assert len(presets) == 8 and expected | presets | {"fastcpt/py.typed"} <= set(names)


def _copy(target: Path) -> Path:
    """The sources without what building leaves beside them."""
    import shutil

    for folder in ROOMS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target

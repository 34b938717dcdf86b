"""The configuration: what loads, what is refused and how, and the list of settings."""

import re
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from fastcpt import UserError, attention
from fastcpt.config import (
    SECTIONS,
    Config,
    Count,
    Data,
    Init,
    Model,
    Optim,
    Phase,
    Run,
    Schedule,
    Source,
    Train,
    ValidationSet,
    fields,
    parse,
    to_dict,
    to_yaml,
)

# DESIGN.md, section 4, word for word.
EXAMPLE = """\
model: {preset: pythia-410m, gelu: erf}          # or layers, width, heads, rotary_fraction, vocab_size ...
init:  {from: EleutherAI/pythia-410m@step143000, optimizer: reset}   # scratch | hub id[@revision] | directory | checkpoint
data:
  seq_len: 2048
  document_mask: false
  train:
    - {name: slimpajama, path: shards/slimpajama, weight: 0.95}
    - {name: pile, path: shards/pile, weight: 0.05, replay: true}
  val:
    - {name: pile, path: shards/pile-val, role: upstream}
    - {name: slimpajama, path: shards/slimpajama-val, role: downstream}
train: {tokens: 250B, batch_tokens: 2_260_992, micro_batch: 23, seed: 0, parallel: auto, compile: true, precision: bf16}
optim: {lr: 3.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, clip: 1.0}
schedule: {kind: cosine, warmup: 0.01, min_lr_ratio: 0.1}
run:   {output: runs/cpt-410m, log_every: 10, eval_every: 500, eval_tokens: 4_194_304, save_every: 1000, keep: 2, tensorboard: true, wandb: null}
"""

SMALLEST = """\
data: {train: [{name: a, path: sets/a, weight: 1}]}
train: {tokens: 1M, batch_tokens: 4096}
optim: {lr: 1e-3}
run: {output: runs/small}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """load(text, *overrides) parses a file of that text."""
    file = tmp_path / "run.yaml"

    def load(text: str | bytes, *overrides: str) -> Config:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse(["--config", str(file), *overrides])

    return load


def test_the_example_of_the_design_loads(load: Callable) -> None:
    assert load(EXAMPLE) == Config(
        model=Model(preset="pythia-410m", gelu="erf"),
        init=Init(from_="EleutherAI/pythia-410m@step143000", optimizer="reset"),
        data=Data(
            seq_len=2048,
            document_mask=False,
            train=[
                Source(name="slimpajama", path="shards/slimpajama", weight=0.95),
                Source(name="pile", path="shards/pile", weight=0.05, replay=True),
            ],
            val=[
                ValidationSet(name="pile", path="shards/pile-val", role="upstream"),
                ValidationSet(name="slimpajama", path="shards/slimpajama-val", role="downstream"),
            ],
        ),
        train=Train(tokens=Count(250_000_000_000), batch_tokens=Count(2_260_992), micro_batch=23),
        optim=Optim(lr=0.0003, betas=[0.9, 0.95], eps=0.00000001, weight_decay=0.1, clip=1.0),
        schedule=Schedule(kind="cosine", warmup=0.01, min_lr_ratio=0.1),
        run=Run(output="runs/cpt-410m", log_every=10, eval_every=500, eval_tokens=Count(4_194_304), save_every=1000),
    )


def test_what_is_not_given_is_what_pythia_and_the_paper_used(load: Callable) -> None:
    """A default is a promise too: the recipe of arXiv 2308.04014 on the widths of Pythia, as the design's example."""
    smallest, example = to_dict(load(SMALLEST)), to_dict(load(EXAMPLE))
    assert smallest["data"] == {
        "train": [{"name": "a", "path": "sets/a", "weight": 1.0, "replay": False}],
        "phases": [], "val": [], "seq_len": 2048, "document_mask": False, "reader": "mmap",
    }  # fmt: skip
    assert smallest["model"] == dict.fromkeys(example["model"])
    assert smallest["init"] == {"from": "scratch", "optimizer": "reset", "branch": False, "force": False}
    own = {"tokens": 1_000_000, "batch_tokens": 4096, "micro_batch": 0}
    assert smallest["train"] == example["train"] | own
    assert smallest["optim"] == example["optim"] | {"lr": 1e-3}
    assert smallest["schedule"] == example["schedule"]
    assert smallest["run"] == example["run"] | {"output": "runs/small"}


def test_numbers_that_yaml_reads_as_text_are_numbers(load: Callable) -> None:
    assert isinstance(yaml.safe_load("3e-4"), str), "PyYAML wants a point"
    text = SMALLEST.replace("{lr: 1e-3}", "{lr: 3e-4, eps: 1e-8, betas: [9e-1, 95e-2], clip: 1e0, weight_decay: 0}")
    optim = load(text.replace("tokens: 1M", "tokens: 2.5e11")).optim
    assert optim == Optim(lr=0.0003, eps=1e-8, betas=[0.9, 0.95], clip=1.0, weight_decay=0.0)
    assert all(type(value) is float for value in (optim.lr, optim.eps, optim.clip, *optim.betas))
    assert load(SMALLEST, "--optim.lr", "3e-4", "--train.tokens=2.5e11").train.tokens == 250_000_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("250B", 250_000_000_000),
        ("2.5e11", 250_000_000_000),
        ("2.5e+11", 250_000_000_000),
        (2.5e11, 250_000_000_000),
        ("2_260_992", 2_260_992),
        (2_260_992, 2_260_992),
        ("1.5M", 1_500_000),
        ("1.005M", 1_005_000),  # 1004999.9999999999 in floats
        ("1t", 10**12),
        ("64K", 64_000),
        (" 0.001K ", 1),
        ("0", 0),
    ],
)
def test_counts_are_exact(text: Any, expected: int) -> None:
    count = Count.parse(text)
    assert count == expected and type(count) is Count


@pytest.mark.parametrize(
    "text", ["10X", "-5", "1.5", "", "B", "1.0005K", "1e-3", "1e400", "inf", "nan", True, None, "1 2"]
)
def test_what_is_no_count_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        Count.parse(text)


# Every setting, one value that is not its default. A list is given whole.
OVERRIDES: dict[str, tuple[str, Any]] = {
    "model.preset": ("pythia-70m", "pythia-70m"),
    "model.layers": ("3", 3),
    "model.width": ("96", 96),
    "model.heads": ("6", 6),
    "model.vocab_size": ("1000", 1000),
    "model.mlp_width": ("100", 100),
    "model.rotary_fraction": ("0.5", 0.5),
    "model.gelu": ("tanh", "tanh"),
    "model.parallel_residual": ("false", False),
    "init.from": ("some/model@step1", "some/model@step1"),
    "init.optimizer": ("keep", "keep"),
    "init.branch": ("false", False),
    "init.force": ("true", True),
    "data.train": (
        "[{name: b, path: p, weight: 2e-1, replay: true}, {name: c, path: q, weight: 3}]",
        [Source(name="b", path="p", weight=0.2, replay=True), Source(name="c", path="q", weight=3.0)],
    ),
    "data.phases": (
        "[{tokens: 0.5M, weights: {a: 1}}, {until_lr: 5e-1}, {lr: 1e-4, schedule: {kind: wsd, decay: 1K}}]",
        [
            Phase(tokens=Count(500_000), weights={"a": 1.0}),
            Phase(until_lr=0.5),
            Phase(lr=1e-4, schedule=Schedule(kind="wsd", decay="1K")),
        ],
    ),
    "data.val": ("[{name: v, path: w, role: upstream}]", [ValidationSet(name="v", path="w", role="upstream")]),
    "data.seq_len": ("1024", 1024),
    "data.document_mask": ("true", True),
    "data.reader": ("pread", "pread"),
    "train.tokens": ("2B", 2_000_000_000),
    "train.batch_tokens": ("64_000", 64_000),
    "train.micro_batch": ("3", 3),
    "train.seed": ("7", 7),
    "train.parallel": ("ddp", "ddp"),
    "train.deterministic": ("true", True),
    "train.recompute": ("blocks", "blocks"),
    "train.compile": ("false", False),
    "train.precision": ("fp32", "fp32"),
    "train.kernels": ("torch", "torch"),
    "train.loss": ("blocks", "blocks"),
    "train.attention": ("cudnn", "cudnn"),
    "optim.lr": ("2e-3", 0.002),
    "optim.betas": ("[0.8, 0.9]", [0.8, 0.9]),
    "optim.eps": ("1e-6", 1e-6),
    "optim.weight_decay": ("0", 0.0),
    "optim.clip": ("2", 2.0),
    "optim.moments": ("bf16", "bf16"),
    "schedule.kind": ("constant", "constant"),
    "schedule.warmup": ("20", 20.0),
    "schedule.cooldown": ("0.5", 0.5),
    "schedule.decay": ("2B", "2B"),
    "schedule.min_lr_ratio": ("0", 0.0),
    "run.output": ("elsewhere", "elsewhere"),
    "run.log_every": ("2", 2),
    "run.eval_every": ("3", 3),
    "run.eval_tokens": ("1K", 1000),
    "run.save_every": ("4", 4),
    "run.keep": ("5", 5),
    "run.keep_every": ("4000", 4000),
    "run.tensorboard": ("false", False),
    "run.wandb": ("project", "project"),
    "run.timeout": ("60", 60.0),
    "run.check_every": ("100", 100),
    "run.profile": ("50", 50),
    "run.stop_at": ("9", 9),
    "train.skip_spikes": ("6", 6.0),
    "train.ema": ("2M", 2_000_000),
    "optim.embeddings_first": ("0.1", 0.1),
    "optim.new_rows_lr": ("5", 5.0),
}


def value_of(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), {"from": "from_"}.get(key, key))


def test_overrides_reach_every_setting() -> None:
    assert OVERRIDES.keys() == {name for name, _ in fields() if "[]" not in name}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_setting_can_be_overridden_and_nothing_else_changes(load: Callable, name: str) -> None:
    text, expected = OVERRIDES[name]
    # A sequence length that divides every batch here.
    base = SMALLEST.replace("data: {", "data: {seq_len: 64, ") if name == "train.batch_tokens" else SMALLEST
    before = load(base)
    for spelling in ([f"--{name}", text], [f"--{name}={text}"]):
        after = load(base, *spelling)
        assert value_of(after, name) == expected
        changed = [other for other in OVERRIDES if value_of(after, other) != value_of(before, other)]
        assert changed == ([] if expected == value_of(before, name) else [name])
    section, key = name.split(".")
    content = yaml.safe_load(base)
    content.setdefault(section, {})[key] = yaml.safe_load(text)
    assert load(yaml.safe_dump(content)) == after, "the same in the file"


def test_a_branch_takes_no_rate_and_no_warmup(load: Callable) -> None:
    text = SMALLEST.replace("optim: {lr: 1e-3}\n", "init: {from: runs/a, branch: true}\nschedule: {warmup: 0}\n")
    assert load(text).init == Init(from_="runs/a", branch=True)


@pytest.mark.parametrize("text", [EXAMPLE, SMALLEST])
def test_what_is_written_is_what_is_read(load: Callable, text: str) -> None:
    config = load(text, "--init.force", "true", "--run.wandb", "größe 🙂")
    written = to_yaml(config)
    assert load(written) == config
    assert to_yaml(load(written)) == written
    content = yaml.safe_load(written)
    assert content == to_dict(config)
    assert list(content) == list(SECTIONS) and "from_" not in content["init"]
    assert "größe 🙂" in written, "people read it"
    assert {f"{section}.{key}" for section in content for key in content[section]} == OVERRIDES.keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("run:", "rum: {a: 1}\nrun:", "there is no section 'rum'"),
        ("run:", "rum:\nrun:", "there is no section 'rum'"),
        ("output:", "outptu: x, output:", "'run' does not accept option 'outptu'"),
        ("weight: 1", "weight: 1, wieght: 2", "'wieght' is not accepted"),
        ("optim: {lr: 1e-3}", "optim:", "the section optim is None, not a mapping"),
        ("optim: {lr: 1e-3}", "optim: 5", "the section optim is 5, not a mapping"),
        ("optim: {lr: 1e-3}", "optim: [lr, 1]", "the section optim is ['lr', 1], not a mapping"),
        ("1e-3", "fast", '"optim.lr"'),
        ("4096", "many", "\"train.batch_tokens\": Not of type Count: 'many' is not a number of tokens"),
        ("1M", "1.5", '"train.tokens": Not of type Count: 1.5 is not a whole number'),
        ("weight: 1", "weight: heavy", "Given value: heavy"),
        ("4096", "4096, seed: 1.5", "\"train.seed\": Expected a <class 'int'>"),
        ("4096", "4096, compile: 2", "typing.Literal['blocks', 'graphs'] - Expected a <class 'bool'>"),
        ("4096", "4096, precision: fp16", '"train.precision"'),
        ("run:", "init: {from: 5}\nrun:", '"init.from"'),
        ("run:", "schedule: {kind: quadratic}\nrun:", '"schedule.kind"'),
        ("tokens: 1M, ", "", "required: train.tokens"),
        ("train: {tokens: 1M, batch_tokens: 4096}\n", "", "required: train.tokens, train.batch_tokens"),
        ("data: {train: [{name: a, path: sets/a, weight: 1}]}\n", "", "required: data.train"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(
    load: Callable, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in SMALLEST
    with pytest.raises(UserError) as raised:
        load(SMALLEST.replace(old, new, 1))
    assert str(tmp_path / "run.yaml") in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [b", "not YAML"),
        ("a: b: c", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        ("[1, 2]", "not a mapping of sections (model, init, data, train, optim, schedule, run)"),
        ("text", "not a mapping"),
        ("", "not a mapping"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_what_is_no_configuration_file_is_named(
    tmp_path: Path, content: str | bytes, message: str, joined: bool
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(f"{file}: {message}")):
        parse([f"--config={file}"] if joined else ["--config", str(file)])


@pytest.mark.parametrize("joined", [False, True])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, joined: bool) -> None:
    for file in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"{file}: there is no such configuration file")):
            parse([f"--config={file}"] if joined else ["--config", str(file)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.train, train.tokens, train.batch_tokens, run.output"),
        (["--config"], "--config: expected one argument"),
        (["--nope", "1"], "unrecognized arguments: --nope 1"),
        (["--train.nope", "1"], "unrecognized arguments: --train.nope 1"),
        (["--optim.weight", "0.5"], "unrecognized arguments: --optim.weight 0.5"),  # no short spelling of weight_decay
        (["--train.compil=false"], "unrecognized arguments: --train.compil=false"),
        (["--optim.clip", "wide"], "\"optim.clip\": Expected a <class 'float'>. Got value: wide"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(arguments)


INFINITE = float("inf")
BRANCH = {"from_": "runs/a", "branch": True}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"seq_len": 0}}, "data.seq_len is 0; it must be at least 1"),
        ({"train": {"tokens": Count(0)}}, "train.tokens is 0"),
        ({"train": {"micro_batch": -1}}, "train.micro_batch is -1"),
        ({"run": {"log_every": 0}}, "run.log_every is 0"),
        ({"run": {"eval_every": -1}}, "run.eval_every is -1"),
        ({"run": {"save_every": 0}}, "run.save_every is 0"),
        ({"run": {"keep": 0}}, "run.keep is 0"),
        ({"run": {"keep_every": -1}}, "run.keep_every is -1"),
        ({"run": {"timeout": 0.0}}, "run.timeout 0.0 must be above 0 seconds"),
        ({"run": {"check_every": -1}}, "run.check_every is -1"),
        ({"run": {"profile": -1}}, "run.profile is -1"),
        ({"train": {"skip_spikes": -1.0}}, "train.skip_spikes -1.0 must be a number from 0 on"),
        ({"optim": {"lr": 1.0, "embeddings_first": 1.5}}, "optim.embeddings_first 1.5 is neither a fraction below 1"),
        ({"optim": {"lr": 1.0, "new_rows_lr": -1.0}}, "optim.new_rows_lr -1.0 is not a number from 0 on"),
        ({"run": {"eval_tokens": Count(0)}}, "run.eval_tokens is 0"),
        ({"train": {"batch_tokens": Count(17)}}, "train.batch_tokens 17 is not a multiple of data.seq_len 16"),
        ({"train": {"batch_tokens": Count(8)}}, "train.batch_tokens 8 is not a multiple"),
        ({"train": {"batch_tokens": Count(0)}}, "train.batch_tokens 0 is not a multiple"),
        ({"data": {"train": []}}, "data.train is empty"),
        (
            {"data": {"train": [Source(name="x", path="p", weight=1), Source(name="x", path="q", weight=1)]}},
            "data.train: the names ['x', 'x'] are not all different",
        ),
        (
            {"data": {"val": [ValidationSet(name="v", path="p"), ValidationSet(name="v", path="q")]}},
            "data.val: the names ['v', 'v'] are not all different",
        ),
        ({"data": {"train": [Source(name="x", path="p", weight=0)]}}, "data.train x: weight 0"),
        ({"data": {"train": [Source(name="x", path="p")]}}, "data.train x: weight None is not a number above 0"),
        ({"data": {"train": [Source(name="x", path="p", weight=INFINITE)]}}, "data.train x: weight inf"),
        ({"data": {"train": [Source(name="x", path="p", weight=float("nan"))]}}, "data.train x: weight nan"),
        ({"optim": {"betas": [0.9]}}, "optim.betas [0.9] must be two numbers"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas [0.9, 1.0]"),
        ({"optim": {"betas": [-0.1, 0.9]}}, "optim.betas [-0.1, 0.9]"),
        ({"optim": {"clip": 0.0}}, "optim.clip 0.0 must be above 0"),
        ({"optim": {"eps": 0.0}}, "optim.eps 0.0 must be above 0"),
        ({"optim": {"weight_decay": -0.1}}, "optim.weight_decay -0.1"),
        ({"optim": {"weight_decay": INFINITE}}, "optim.weight_decay inf"),
        ({"optim": {"lr": None}}, "optim.lr is None; give the peak learning rate"),
        ({"optim": {"lr": 0.0}}, "optim.lr is 0.0"),
        ({"optim": {"lr": INFINITE}}, "optim.lr is inf"),
        ({"schedule": {"warmup": -1.0}}, "schedule.warmup -1.0"),
        ({"schedule": {"warmup": INFINITE}}, "schedule.warmup inf"),
        (
            {"schedule": {"decay": 1.5}},
            "schedule.decay 1.5 is neither a fraction below 1, a whole number of steps, nor",
        ),
        ({"schedule": {"cooldown": "2Q"}}, "schedule.cooldown 2Q is neither"),
        ({"schedule": {"decay": "0.0005K"}}, "schedule.decay 0.0005K is neither"),
        ({"schedule": {"min_lr_ratio": 1.1}}, "schedule.min_lr_ratio 1.1 is not from 0 to 1"),
        ({"schedule": {"min_lr_ratio": -0.1}}, "schedule.min_lr_ratio -0.1"),
        ({"init": {"branch": True}, "optim": {"lr": None}}, "init.branch needs init.from"),
        ({"init": BRANCH, "schedule": {"warmup": 0}}, "optim.lr 0.001: a branch starts at its checkpoint's rate"),
        ({"init": BRANCH, "optim": {"lr": None}}, "schedule.warmup 0.01: a branch has no warm-up; set it to 0"),
    ],
)
def test_impossible_runs_are_refused(tiny_config: Callable, sections: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        tiny_config(**sections)


# A new setting is a deliberate act: one more thing that every user reads, every resume compares and every test varies.
# Whoever adds one adds it here, and takes another away when the list grows beyond sixty, and five for a run of several phases (DESIGN.md, D18).
NAMES = """
model.preset model.layers model.width model.heads model.vocab_size model.mlp_width model.rotary_fraction model.gelu
model.parallel_residual
init.from init.optimizer init.branch init.force
data.train data.train[].name data.train[].path data.train[].weight data.train[].replay
data.phases data.phases[].tokens data.phases[].until_lr data.phases[].weights data.phases[].schedule data.phases[].lr
data.val data.val[].name data.val[].path data.val[].role
data.seq_len data.document_mask data.reader
train.tokens train.batch_tokens train.micro_batch train.seed train.parallel train.deterministic train.recompute train.compile
train.precision train.kernels train.loss train.attention train.skip_spikes train.ema
optim.lr optim.betas optim.eps optim.weight_decay optim.clip optim.moments optim.embeddings_first
optim.new_rows_lr
schedule.kind schedule.warmup schedule.cooldown schedule.decay schedule.min_lr_ratio
run.output run.log_every run.eval_every run.eval_tokens run.save_every run.keep run.keep_every run.tensorboard run.wandb
run.timeout run.check_every run.stop_at run.profile
"""


def test_the_list_of_settings_is_what_was_agreed() -> None:
    assert [name for name, _ in fields()] == NAMES.split()
    # A list of sources is no setting, its fields are.
    assert len([name for name in NAMES.split() if f"{name}[]" not in NAMES]) <= 68


def test_attention_has_the_names_of_its_backends() -> None:
    assert get_type_hints(Train)["attention"] == attention.Name


def test_every_setting_says_in_one_line_what_it_is() -> None:
    for name, description in fields():
        assert description.strip() == description and len(description) >= 10, name
        assert "\n" not in description and description.endswith("."), name


def test_no_field_escapes_the_documentation() -> None:
    declared = sum(
        len(dataclass_fields(cls))
        for cls in (Model, Init, Data, Source, Phase, ValidationSet, Train, Optim, Schedule, Run)
    )
    assert len(fields()) == declared

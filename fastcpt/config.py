"""The configuration: one YAML file, checked against these dataclasses, with `--section.field VALUE` overrides.

This is the only place where a setting is born, with its unit and its default. The string under each field is its
documentation: `fields()` turns it into the table of the README and the help of the command line.
"""

import ast
import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastcpt import UserError, yaml_files
from fastcpt.checks import check
from fastcpt.imports import without_imports
from fastcpt.units import Count


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model. All of it is optional when `init.from` names a checkpoint, which knows its own sizes."""

    preset: str | None = None
    """A Pythia size, pythia-14m to pythia-12b; the other fields change it."""
    layers: int | None = None
    """Number of blocks."""
    width: int | None = None
    """Width of the residual stream."""
    heads: int | None = None
    """Attention heads a block."""
    vocab_size: int | None = None
    """Rows of both embeddings, padding included."""
    mlp_width: int | None = None
    """Inner width of the MLP; 4 * width unless given."""
    rotary_fraction: float | None = None
    """Part of each head that is rotated; 0.25 unless given."""
    gelu: Literal["erf", "tanh"] | None = None
    """GELU's form. Hugging Face's files say erf; Pythia was trained with tanh. The checkpoint's unless given."""
    parallel_residual: bool | None = None
    """Attention and MLP read the same input; true unless given."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """Where the run starts."""

    from_: str = "scratch"
    """scratch, a Hugging Face folder, hub-id[@revision], or a fastcpt checkpoint (or run folder: its newest)."""
    optimizer: Literal["reset", "keep"] = "reset"
    """Adam's moments: fresh, or those of the checkpoint."""
    branch: bool = False
    """Go on from a checkpoint's step, moments and data position with a new schedule that starts at its rate."""
    force: bool = False
    """Do what is refused for your sake: re-warm on data the model has seen, or train with another tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One training set of the mixture."""

    name: str
    """Its name in logs."""
    path: str
    """A shard set."""
    weight: float | None = None
    """Its share of the samples; weights are relative to their sum. Phases may say theirs instead."""
    replay: Literal["in_order"] | bool = False
    """It is what the model has read before, mixed in against forgetting; in_order: as it was read then, not shuffled anew."""


Kind = Literal[
    "constant", "cosine", "cosine_clipped", "linear", "inverse_sqrt",
    "wsd", "wsd_linear", "wsd_cosine", "wsd_exponential", "infinite", "infinite_inverse_sqrt", "decay_only", "anneal",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over the steps of the run."""

    kind: Kind = "cosine"
    """After the warm-up: one shape to the end; wsd and infinite: constant, then a decay; decay_only, anneal: in a branch or later phase."""
    warmup: float | str = 0.01
    """Linear warm-up: below 1 a fraction of the steps, from 1 on a number of steps, as text (2B) tokens."""
    cooldown: float | str | None = None
    """Of infinite: how long the rate falls from the peak to half-way between peak and end; 0.6 unless given."""
    decay: float | str | None = None
    """Of wsd and infinite: how long the last decay takes; wsd 0.1, infinite 0.14 unless given. Between, it is constant."""
    min_lr_ratio: float = 0.1
    """Where the rate ends, relative to the peak (of a branch: to its checkpoint's rate)."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run."""

    tokens: Count | None = None
    """Its length; the last phase may leave it out and takes the rest. The ends are those of the nearest steps."""
    until_lr: float | None = None
    """Instead of tokens: it ends where the rate has fallen to this part of its schedule's peak."""
    weights: dict[str, float] | None = None
    """{source: weight} of those that it reads, 0 for none; unless given, the sources' own weights."""
    schedule: Schedule | None = None
    """As the section schedule: one that begins with this phase and holds until the next that brings one; not in the first."""
    lr: float | None = None
    """Peak of its schedule, which without one starts at the rate that the phase before ended with, as a branch does."""


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """One validation set."""

    name: str
    """Its name in logs."""
    path: str
    """A shard set."""
    role: Literal["upstream", "downstream", "other"] = "other"
    """upstream measures forgetting, downstream adaptation."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and how."""

    train: list[Source]
    """The mixture."""
    phases: list[Phase] = field(default_factory=list)
    """Parts of the run, one after another, with other weights or a schedule of their own; none: one mixture, one schedule."""
    val: list[ValidationSet] = field(default_factory=list)
    """Sets evaluated from step 0, by name."""
    seq_len: int = 2048
    """Tokens a sequence."""
    document_mask: bool = False
    """Attention stays within a document. Off: Pythia was trained across documents."""
    reader: Literal["mmap", "pread"] = "mmap"
    """How shards are read; pread for network file systems."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How much, how large, on what."""

    tokens: Count
    """Tokens that this run trains on; whole steps, rounded up."""
    batch_tokens: Count
    """Tokens an optimizer step, a multiple of data.seq_len."""
    micro_batch: int = 0
    """Sequences a process takes at once, at most; 0: as many as fit its memory and serve its speed."""
    seed: int = 0
    """Of the initialisation and of the data order."""
    parallel: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = "auto"
    """auto: ddp where a whole copy fits each process, else hsdp or fsdp: parameters, gradients and moments in shards."""
    deterministic: bool = False
    """Sums in a fixed order: the same bits with 1, 2 or 4 processes, in any layout; slower."""
    recompute: Literal["auto", "none", "blocks"] = "auto"
    """blocks: activations are computed twice and not kept, a third more compute. auto: where memory demands it."""
    compile: Literal["blocks", "graphs"] | bool = True
    """Use torch.compile. blocks: one by one, starts sooner. graphs: and CUDA graphs, for small models; never run so far."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Dtype of activations and products; all else is fp32. fp8: bf16, blocks' products in fp8; for wide models, never run."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """auto: our Triton kernels on a GPU, torch on CPU."""
    loss: Literal["auto", "full", "blocks"] = "auto"
    """blocks: never more than a block of the logits in memory, slower on a GPU. auto: blocks on CPU, full on a GPU."""
    attention: Literal["auto", "sdpa", "blocks", "cudnn", "flash2", "flash3", "flash4", "varlen"] = "auto"
    """auto: the fastest that is installed and fits the GPU; on CPU blocks in bf16, else sdpa."""
    skip_spikes: float = 0.0
    """Skip steps whose loss or gradient norm is so many standard deviations above the last 128 steps' mean; 0: none."""
    ema: Count | None = None
    """Half-life, in tokens, of a moving average of the weights kept beside them from the start; null: none."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW."""

    lr: float | None = None
    """Peak learning rate. A branch starts at its checkpoint's rate and takes none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Of matrices, embeddings included; biases and norms have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Dtype of Adam's moments; bf16 ones take half the memory and are rounded stochastically."""
    embeddings_first: float | str | None = None
    """How long, from the start, both embeddings alone are updated; a length as schedule.warmup. Null: not at all."""
    new_rows_lr: float | None = None
    """Rate of the rows of new tokens (`fastcpt extend`), relative to that of all else; 1 unless given."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where results go, and how often. Free to change when a run goes on, but for eval_tokens."""

    output: str
    """The run's folder; started again with the same one, a run goes on."""
    log_every: int = 10
    """Steps a training line."""
    eval_every: int = 500
    """Steps an evaluation; the start and the end are always evaluated, and the warm-up four times as often."""
    eval_tokens: Count = Count(4_194_304)  # noqa: RUF009 (an int, which cannot change)
    """Tokens of each validation set, the same ones every time."""
    save_every: int = 1000
    """Steps a checkpoint; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are never removed; 0 for none."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Weights & Biases project; null for none."""
    timeout: float = 600.0
    """Seconds without progress after which a run ends, naming the hung process; five times as many where it may compile."""
    check_every: int = 0
    """Steps a comparison of the replicas' weights, beside the one before each checkpoint; 0: no other."""
    stop_at: int = 0
    """Save and end at this step, before the schedule's end; raised or removed, the run goes on. 0: at the end."""
    profile: int = 0
    """The step after which three are profiled, into profile/ of the run's folder; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    data: Data
    train: Train
    run: Run
    model: Model = field(default_factory=Model)
    init: Init = field(default_factory=Init)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        check(self)


SECTIONS = ("model", "init", "data", "train", "optim", "schedule", "run")


def documentation(cls: type) -> dict[str, str]:
    """{field: the string under it} of a dataclass of this module."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, following in zip(body.body, body.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            texts[statement.target.id] = str(following.value.value)
    return texts


def fields() -> list[tuple[str, str]]:
    """Every setting as (dotted name, description), the entries of lists as `data.train[].weight`."""

    def walk(cls: type, prefix: str) -> list[tuple[str, str]]:
        rows = []
        for name, text in documentation(cls).items():
            shown = prefix + name.removesuffix("_")  # `from` is a keyword of Python: the field is `from_`
            rows.append((shown, text))
            hint = get_type_hints(cls)[name]
            inner = get_args(hint)[0] if get_origin(hint) is list else None
            if is_dataclass(inner):
                assert isinstance(inner, type)
                rows += walk(inner, f"{shown}[].")
        return rows

    return [row for section in SECTIONS for row in walk(get_type_hints(Config)[section], f"{section}.")]


def parse(arguments: Sequence[str]) -> Config:
    """`--config FILE [--section.field VALUE ...]` -> Config. Raises UserError that names the file and the field.

    With --print_config it prints the resolved configuration as a file and exits.
    """
    import jsonargparse
    import yaml

    jsonargparse.set_loader("fastcpt", yaml_files.load, exceptions=(yaml.YAMLError,))
    jsonargparse.typing.register_type(Count, serializer=int, deserializer=Count.parse, fail_already_registered=False)
    parser = jsonargparse.ArgumentParser(
        "fastcpt train", exit_on_error=False, parser_mode="fastcpt", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config")
    hints = get_type_hints(Config)
    for section in SECTIONS:
        parser.add_class_arguments(hints[section], section, fail_untyped=True)
    printing = "--print_config" in arguments
    arguments = [re.sub(r"^--init\.from(?=$|=)", "--init.from_", each) for each in arguments]
    arguments = [part for each in arguments for part in each.split("=", 1 if each.startswith("--config=") else 0)]
    arguments = [each for each in arguments if each != "--print_config"]
    for index in (places := [index + 1 for index, each in enumerate(arguments[:-1]) if each == "--config"]):
        arguments[index] = yaml_files.find(arguments[index])
        yaml_files.check(arguments[index], SECTIONS)
    files = [arguments[index] for index in places]
    try:
        values = without_imports(lambda: parser.instantiate(parser.parse_args(arguments)))
    except jsonargparse.ArgumentError as error:
        what = " ".join(str(error).split()).replace("from_", "from")
        raise UserError("setting-invalid", f"{' '.join([*files, ''])}{what}") from None
    config = Config(**{section: values[section] for section in SECTIONS})
    if printing:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, as they are written in a file."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, Count) else value

    values = {section: plain(asdict(getattr(config, section))) for section in SECTIONS}
    values["init"]["from"] = values["init"].pop("from_")
    return values


def to_yaml(config: Config) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)

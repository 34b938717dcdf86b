"""A checkpoint as a Hugging Face model with its model card, in a folder and, if asked, on the hub.

The card says only what the checkpoint's `state.json` and the run's `metrics.jsonl` say; what they do not say is said to
be unknown. It names no path of this machine: a local folder becomes its name.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastcpt import UserError, __version__, checkpoint, hf
from fastcpt.data import MILLION, PhaseSource
from fastcpt.metrics import parameter_count
from fastcpt.model import Architecture
from fastcpt.progress import short_count
from fastcpt.schedules import Plan
from fastcpt.weights import Weights

UNKNOWN = "unknown"
DEFINITIONS = (
    "*Forgetting* is the upstream loss at the end minus at the start, *adaptation* the downstream loss at the start minus "
    "at the end; means over the sets of a role, in nats a token. Positive forgetting is harm, positive adaptation is gain."
)


def export(source: str, output: str, push: str | None = None, ema: bool = False) -> str:
    """Writes the model of a checkpoint, a run (its newest) or a Hugging Face model to the new folder `output`.

    push: a hub id; the folder is then uploaded there (`upload`). ema: the moving average of a checkpoint's weights.
    Returns the repository's URL, or else the folder.
    """
    if "://" in output:
        raise UserError("output-remote", f"{output}: a URL; name a folder of this machine")
    if push is not None:
        check_hub(push)  # before the work, as far as it can be known without the network
    weights = Weights.open(source, ema)
    card = _card(source, weights.folder, push, ema)
    files = {"README.md": card.encode()}
    hf.save_tensors(weights.tensor, weights.arch, output, weights.tokenizer, weights.eod, files=files)
    return output if push is None else upload(Path(output), push)


def check_hub(hub_id: str) -> None:
    """Raises UserError when `hub_id` cannot be one, or when nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        raise UserError(
            "hub-id-malformed", f"--push {hub_id}: not a hub id; write it as NAME or ORGANISATION/NAME"
        ) from None
    if not get_token():
        raise UserError("hub-login", f"--push {hub_id}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, hub_id: str) -> str:
    """Uploads a folder to the hub and returns the repository's URL. A new repository is private: its owner opens it.

    Raises UserError for what the hub refuses and for a dead network; the token is never part of a message.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    check_hub(hub_id)
    token = str(get_token())

    def refused(reason: str) -> UserError:
        then = f"{folder} is whole; then `hf upload --private {hub_id} {folder}`"
        return UserError("hub-refuses", f"--push {hub_id}: {_plain(reason.replace(token, '***'))}; {then}")

    api = HfApi(token=token, library_name="fastcpt", library_version=__version__)
    try:
        repository = api.create_repo(hub_id, private=True, exist_ok=True)
        message = f"Export by fastcpt {__version__}"
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise refused("the hub does not accept the token (401); run `hf auth login`, or mend HF_TOKEN") from error
        if status == 403:
            raise refused("the token may not write there (403); use one that may, or another name") from error
        raise refused(f"the hub answered {status}, {error.server_message or 'without a reason'}; mend that") from error
    except Exception as error:  # the classes for a dead network differ between versions
        reason = str(error).partition("\n")[0]
        reason = f"no upload to {api.endpoint} ({type(error).__name__}: {reason}); mend the network or what it says"
        raise refused(reason) from error
    return str(repository)


def model_card(source: str) -> str:
    """The README.md, in the hub's model-card form, of a checkpoint, a run (its newest) or a Hugging Face model."""
    return _card(source, checkpoint.find(source) or hf.resolve(source), None)


@dataclass(frozen=True)
class Base:
    """What the weights started from. name: for people; hub_id: without the revision."""

    name: str
    hub_id: str | None = None


@dataclass(frozen=True)
class Measured:
    """Evaluations of a run: {set: {"loss", "bits_per_byte", "role", "tokens"}} where it started, and last until now."""

    start: dict[str, dict[str, Any]] = field(default_factory=dict)
    end: dict[str, dict[str, Any]] = field(default_factory=dict)
    end_step: int | None = None
    changes: dict[str, float] = field(default_factory=dict)


def merged_card(shares: Sequence[tuple[str, float]], method: str) -> str:
    """The card of an average of models. shares: (what named each, its weight)."""
    rows = [(_named(source, Path(source).expanduser().is_dir()).name, f"{share:.6g}") for source, share in shares]
    mean = "average" if method == "linear" else "spherical interpolation"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt_neox, merge]\n---",
        f"# A merged model\n\nThe {mean}, tensor by tensor, of the weights of GPT-NeoX language models:",
        _table(("model", "weight"), rows),
        f"Written by fastcpt {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _card(source: str, folder: Path, hub_id: str | None, ema: bool = False) -> str:
    """The card of what `source` names and `folder` holds; hub_id: where it goes."""
    from huggingface_hub import ModelCard, ModelCardData

    state = checkpoint.read_state(folder) if (folder / checkpoint.STATE).exists() else None
    arch = Architecture(**state["architecture"]) if state else hf.read_architecture(folder)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    if state is None:
        base = _named(source, is_local=Path(source).expanduser().is_dir())
        title, measured, scratch = hub_id or base.name, Measured(), True
        sections = [f"The weights of {base.name}, written again by fastcpt, which did not train them.", _model(arch)]
    else:
        title = hub_id or (run or Path(state["config"]["run"]["output"])).name
        base, measured = _base(state, run), _measured(state, run)
        scratch = state["config"]["init"]["from"] == "scratch"
        sections = [_intro(state, base), _model(arch), _data(state), _training(state), _evaluation(state, measured)]
        if ema:
            sections.insert(1, _averaged(state))
    title = _plain(title.rpartition("/")[2]) or "model"
    data = ModelCardData(
        base_model=base.hub_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt_neox"] if scratch else ["continual-pretraining", "gpt_neox"],
        model_name=title if measured.end else None,
        eval_results=_results(state, measured) if state and measured.end else None,
    )
    sections += [_use(hub_id, (folder / "tokenizer.json").exists()), f"Written by fastcpt {__version__}."]
    body = "\n\n".join([f"# {_text(title)}", *sections])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


# What is known


def _named(source: str, is_local: bool) -> Base:
    """A path of this machine becomes its last part; a checkpoint's also says the run."""
    if is_local:
        path = Path(source)
        parts = (path.parent.parent.name, path.name) if path.parent.name == "checkpoints" else (path.name,)
        return Base(_text(", ".join(parts)) or "a local folder")
    hub_id, _, revision = source.partition("@")
    link = f"[{_text(hub_id)}](https://huggingface.co/{hub_id})"
    return Base(f"{link} at revision {_text(revision)}" if revision else link, hub_id)


def _base(state: dict[str, Any], run: Path | None) -> Base:
    """A hub id only where `init.from` can be nothing else.

    Moments and a branch need a checkpoint. What comes from a checkpoint whose history is known in full is no hub
    model. A relative path may look like a hub id: it is sought from here and from where the run was started.
    """
    config = state["config"]
    source, output = config["init"]["from"], Path(config["run"]["output"])
    starts = [Path()]
    if run is not None and not output.is_absolute() and run.resolve().parts[-len(output.parts) :] == output.parts:
        starts.append(run.resolve().parents[len(output.parts) - 1])
    is_local = (
        state["history"]["complete"]
        or config["init"]["branch"]
        or config["init"]["optimizer"] == "keep"
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[^@]+)?", source)
        or any((start / source).exists() for start in starts)
    )
    return _named(source, is_local)


def _measured(state: dict[str, Any], run: Path | None) -> Measured:
    """From the run's `metrics.jsonl`, if it is this run's: its first evaluation is the one that the checkpoint knows."""
    remembered: dict[str, float] = state["start_losses"]
    unmeasured = Measured({name: {"loss": loss} for name, loss in remembered.items()})
    file = run / "metrics.jsonl" if run else None
    if file is None or not file.exists():
        return unmeasured
    lines = []
    for text in file.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a line that a kill cut short
            continue
        if "eval" in line and line["step"] <= state["step"]:
            lines.append(line)
    if not lines or {name: entry["loss"] for name, entry in lines[0]["eval"].items()} != remembered:
        return unmeasured
    changes = {name: lines[-1][name] for name in ("forgetting", "adaptation") if lines[-1].get(name) is not None}
    return Measured(lines[0]["eval"], lines[-1]["eval"], lines[-1]["step"], changes)


def _results(state: dict[str, Any], measured: Measured) -> list[Any]:
    """For the card's `model-index`. A set is told by its fingerprint, as no data set of the hub is meant."""
    from huggingface_hub import EvalResult

    fingerprints = state["data"]["fingerprints"]["val"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="fastcpt-shards",
            dataset_name=_plain(name),
            dataset_revision=_short(fingerprints[name]),
            metric_type=metric,
            metric_name=title,
            metric_value=entry[metric],
        )
        for name, entry in measured.end.items()
        for metric, title in (("loss", "loss, nats a token"), ("bits_per_byte", "bits per byte"))
        if entry[metric] is not None
    ]


# How it is said


def _plain(text: str) -> str:
    """On one line and printable: in YAML a name with a line `---` would end the front matter."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _text(text: str) -> str:
    """As Markdown that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", _plain(text))


def _short(fingerprint: str) -> str:
    return fingerprint[:12]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, form: str = ".4f") -> str:
    return UNKNOWN if value is None else format(value, form)


def _intro(state: dict[str, Any], base: Base) -> str:
    init, plan = state["config"]["init"], state["plan"]
    if init["from"] == "scratch":
        return "A GPT-NeoX language model, pre-trained from new weights."
    if init["branch"]:
        return (
            f"A GPT-NeoX language model, trained on from {base.name} at its step {plan['first']:,} with a new schedule."
        )
    moments = " and Adam's moments" if init["optimizer"] == "keep" else ""
    known = "" if state["history"]["complete"] else " What that was trained on is not known here in full."
    return f"A GPT-NeoX language model, continually pre-trained from the weights{moments} of {base.name}.{known}"


def _averaged(state: dict[str, Any]) -> str:
    half_life = state["config"]["train"]["ema"]
    return (
        f"These are a moving average of the run's weights, with a half-life of {half_life:,} tokens; the losses below are "
        "those of the weights themselves."
    )


def _model(arch: Architecture) -> str:
    residual = "parallel" if arch.parallel_residual else "sequential"
    rows = [
        ("parameters", f"{parameter_count(arch):,} ({short_count(parameter_count(arch))}), both embeddings included"),
        ("layers, width, heads", f"{arch.layers}, {arch.width:,}, {arch.heads}"),
        ("MLP width", f"{arch.mlp_width:,}"),
        ("vocabulary", f"{arch.vocab_size:,} rows"),
        ("longest sequence", f"{arch.max_positions:,} tokens"),
        ("block", f"{residual} residual, GELU ({arch.gelu}), rotary on {arch.rotary_fraction:.0%} of each head"),
        ("weights", "float32"),
    ]
    return f"## Model\n\n{_table(('GPT-NeoX', ''), rows)}"


def _data(state: dict[str, Any]) -> str:
    data, entries = state["data"], state["config"]["data"]["train"]
    replay = {entry["name"]: "yes" if entry["replay"] else "no" for entry in entries}
    phases, seq_len = [phase for phase in data["phases"] if phase["first"] < data["samples"]], data["seq_len"]
    rows, listed = [], set()
    for phase in reversed(phases):
        for source in phase["sources"]:
            if (key := PhaseSource.from_dict(source).key) in listed:
                continue
            listed.add(key)
            last = phase is phases[-1]
            rows.append((
                _text(source["name"]),
                f"{source['weight'] / MILLION:.4%}".replace(".0000%", "%") if last else "no longer",
                f"{data['seen'].get(key, 0) * seq_len:,}",
                replay[source["name"]] if last else UNKNOWN,
                f"`{_short(source['fingerprint'])}`",
            ))  # fmt: skip
    text = [f"## Data\n\n{_table(('source', 'share', 'tokens given', 'replay', 'fingerprint'), rows)}"]
    for phase, following in pairwise(phases):
        mixture = ", ".join(f"{_text(source['name'])} {source['weight'] / MILLION:.2%}" for source in phase["sources"])
        text.append(
            f"From token {phase['first'] * seq_len:,} to {following['first'] * seq_len:,} the mixture was {mixture}."
        )
    if state["config"]["init"]["branch"]:
        text.append("The tokens include those of the run that this one branched from.")
    text.append(
        "*Replay* is data that the model was trained on before, mixed in against forgetting. A fingerprint is the start "
        "of the hash of a shard set's content."
    )
    return "\n\n".join(text)


def _training(state: dict[str, Any]) -> str:
    config, plan = state["config"], Plan(**state["plan"])
    train, optim = config["train"], config["optim"]
    attention = "within" if config["data"]["document_mask"] else "across"
    last, done = plan.first + plan.steps, state["step"] - plan.first
    settings = ", ".join(f"{key} {value}" for key, value in config["schedule"].items() if value is not None)
    rows = [
        ("tokens", f"{done * train['batch_tokens']:,} ({short_count(done * train['batch_tokens'])}) in this run"),
        ("steps", f"{done:,} of {plan.steps:,}, each of {train['batch_tokens']:,} tokens"),
        ("sequences", f"{config['data']['seq_len']:,} tokens, attention {attention} documents"),
        ("learning rate", f"{plan.describe()}; {plan.rate(last):.3g} at the last step, {state['lr']:.3g} here"),
        ("schedule", _text(settings)),
        ("optimizer", f"AdamW, betas {optim['betas']}, eps {optim['eps']:g}, weight decay {optim['weight_decay']:g}"),
        ("gradients", f"clipped at a norm of {optim['clip']:g}"),
        ("precision", f"{train['precision']} where the hardware has it; parameters and moments float32"),
        ("seed", str(train["seed"])),
    ]  # fmt: skip
    if plan.first:
        rows.insert(1, ("tokens before", f"{state['tokens'] - done * train['batch_tokens']:,}, to step {plan.first:,}"))
    if skipped := state["skipped"][0]:
        rows.append(("steps skipped", f"{skipped:,}, for gradients that were not finite"))
    return f"## Training\n\n{_table(('this run', ''), rows)}"


def _evaluation(state: dict[str, Any], measured: Measured) -> str:
    heading = "## Evaluation: what was learned and what was forgotten\n\n"
    entries = state["config"]["data"]["val"]
    if not entries:
        return f"{heading}The run had no validation sets: forgetting and adaptation are {UNKNOWN}."
    rows = []
    for entry in entries:
        start, end = measured.start.get(entry["name"], {}), measured.end.get(entry["name"], {})
        values = [_number(side.get(metric)) for metric in ("loss", "bits_per_byte") for side in (start, end)]
        tokens = f"{end['tokens']:,}" if end else UNKNOWN
        rows.append((_text(entry["name"]), entry["role"], *values, tokens))
    columns = ("set", "role", "loss, start", "loss, end", "bits/byte, start", "bits/byte, end", "tokens")
    end_step = measured.end_step
    when = f"The start is step {state['plan']['first']:,}; "
    if end_step is None:
        when += "the end is unknown, because the run's metrics.jsonl is not beside this checkpoint."
    else:
        late = "" if end_step == state["step"] else f", but the weights are those of step {state['step']:,}"
        when += f"the end is step {end_step:,}{late}."
    changes = "\n".join(
        f"- {name}: {_number(measured.changes.get(name), '+.4f')}" for name in ("forgetting", "adaptation")
    )
    return f"{heading}{_table(columns, rows)}\n\n{when} Losses are in nats a token.\n\n{changes}\n\n{DEFINITIONS}"


def _use(hub_id: str | None, has_tokenizer: bool) -> str:
    where, note = hub_id or ".", "" if hub_id else "  # this folder"
    if has_tokenizer:
        code = (
            "from transformers import pipeline\n\n"
            f'generate = pipeline("text-generation", model="{where}"){note}\n'
            'print(generate("The function", max_new_tokens=40)[0]["generated_text"])'
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{where}"){note}'
        )
    return f"## Use\n\n```python\n{code}\n```"

"""Hugging Face checkpoint <-> our parameters, both ways.

A checkpoint is a folder with `config.json` and safetensors (`tensor_files.py`). Tensors keep the names and the layout of
`transformers`' GPT-NeoX (reference: its `models/gpt_neox` and FORMATS.md 4.4), so that reading and writing are
bijections. Code that comes with a checkpoint is never run, and no file outside of the folder is read.
"""

import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from fastcpt import UserError, tensor_files
from fastcpt.integrity import read_json, sync_directory, sync_file, write_json
from fastcpt.model import Architecture, GPTNeoX
from fastcpt.parallel import fill_
from fastcpt.tensor_files import MAX_SHARD_BYTES, Stored, headers, member, opened

log = logging.getLogger(__name__)

SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
# Each of these has had several spellings: transformers 4 wrote the first, 4.48 the second as well, 5 the last.
REALS = {
    "norm_eps": ("layer_norm_eps",),
    "rotary_base": ("rotary_emb_base", "rope_theta", "rope_scaling.rope_theta", "rope_parameters.rope_theta"),
    "rotary_fraction": (
        "rotary_pct",
        "partial_rotary_factor",
        "rope_scaling.partial_rotary_factor",
        "rope_parameters.partial_rotary_factor",
    ),
}
GELU: dict[str, Literal["erf", "tanh"]] = {
    "gelu": "erf",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
OLD_ROWS = "fastcpt_old_rows"  # Architecture.old_rows, which transformers keeps and does not read
# What no GPT-NeoX of ours has: (key, its only value, that of a file which does not say, the mend, the error's id).
FIXED = (
    ("model_type", "gpt_neox", None, "only GPT-NeoX models can be trained", "model-not-gpt-neox"),
    ("tie_word_embeddings", False, False, "only untied embeddings are supported; save the model with an embed_out",
     "model-embeddings-tied"),
    ("attention_bias", True, True, "only attention with biases is supported; save the model with zeros for them",
     "model-without-biases"),
    ("auto_map", None, None, "code that comes with a model is never run; remove the key if this is plain GPT-NeoX",
     "model-brings-code"),
)  # fmt: skip


def resolve(source: str) -> Path:
    """A folder as it is, or `hub-id[@revision]` downloaded (or from the hub's cache). Raises UserError."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    hub_id, _, revision = source.partition("@")
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", hub_id):
        raise UserError(
            "model-missing", f"{source}: not a folder, and not a hub-id[@revision]; give the folder of a checkpoint"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
    except RevisionNotFoundError:
        raise UserError(
            "hub-revision-unknown", f"{source}: {hub_id} has no revision {revision!r}; its page on the hub lists them"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            "model-not-on-hub",
            f"{source}: no such folder, and no such model on the hub; mend the name, or log in to see a private one",
        ) from None
    except Exception as error:  # the classes for a dead network, a full disk and a bad name differ between versions
        reason = str(error).partition("\n")[0]
        raise UserError(
            "hub-no-answer",
            f"{source}: no such folder, and the hub did not deliver it ({type(error).__name__}: {reason}); "
            "mend the name or the network, or give the folder of a downloaded copy",
        ) from error


def read_architecture(directory: Path) -> Architecture:
    """The architecture that `config.json` describes, in any of its spellings.

    Raises UserError that names the file, the key, its value and the mend for all that GPT-NeoX of ours is not.
    """
    file = member(directory, "config.json")
    config = read_json(file, "the configuration of a Hugging Face model")

    def refuse(key: str, value: Any, mend: str, id: str = "model-config-value") -> NoReturn:
        raise UserError(id, f"{file}: {key} is {json.dumps(value)}; {mend}")

    def number(key: str, value: Any, kind: tuple[type[int] | type[float], ...]) -> Any:
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < 2**62:  # NaN compares false
            refuse(key, value, f"it must be a non-negative {'integer' if kind == (int,) else 'number'}")
        return value

    def agreed(keys: tuple[str, ...]) -> tuple[str, Any]:
        given = {key: config[key] for key in keys if config.get(key) is not None}
        if not given:
            missing = f"{file}: {keys[0]} is missing; take the config.json that belongs to these weights"
            raise UserError("model-config-key-missing", missing)
        values = list(given.values())
        if values.count(values[0]) != len(values):
            raise UserError(
                "model-config-disagrees",
                f"{file}: {json.dumps(given)} disagree; keep the one that the model was trained with",
            )
        return next(iter(given.items()))

    for key, only, default, mend, id in FIXED:
        if (value := config.get(key, default)) != only:
            refuse(key, value, mend, id)
    for section in ("rope_parameters", "rope_scaling"):
        settings = config.get(section) or {}
        if not isinstance(settings, dict):
            refuse(section, settings, "it must be an object")
        for key, value in settings.items():
            plain = key in ("rope_theta", "partial_rotary_factor") or (
                key in ("rope_type", "type") and value == "default"
            )
            if not plain:
                mend = "only the default rotary embedding is supported, without scaling"
                refuse(f"{section}.{key}", value, mend, "model-rotary-scaled")
            config[f"{section}.{key}"] = value
    for key in ("hidden_dropout", "attention_dropout", "hidden_dropout_prob", "attention_dropout_prob"):
        if config.get(key):
            log.warning("%s: %s is %s; training runs without dropout", file, key, config[key])
    _, activation = agreed(("hidden_act",))
    if not isinstance(activation, str) or activation not in GELU:
        refuse("hidden_act", activation, f"known are {', '.join(GELU)}", "model-activation-unknown")
    # Files from before the key existed mean the parallel form.
    if not isinstance(parallel := config.get("use_parallel_residual", True), bool):
        refuse("use_parallel_residual", parallel, "it must be true or false")
    fields: dict[str, Any] = {ours: number(*agreed((theirs,)), (int,)) for ours, theirs in SIZES.items()}
    fields |= {ours: float(number(*agreed(spellings), (int, float))) for ours, spellings in REALS.items()}
    old_rows = number(OLD_ROWS, config.get(OLD_ROWS, 0), (int,))
    try:
        return Architecture(**fields, gelu=GELU[activation], parallel_residual=parallel, old_rows=old_rows)
    except UserError as error:
        raise UserError(error.id, f"{file}: {error}") from None


def file_name(parameter: str) -> str:
    """The name of one of our parameters in a Hugging Face checkpoint."""
    return parameter if parameter == "embed_out.weight" else f"gpt_neox.{parameter}"


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """{name in a Hugging Face checkpoint: shape} of all parameters."""
    with torch.device("meta"):
        return {file_name(name): tuple(each.shape) for name, each in GPTNeoX(arch).named_parameters()}


def checked(directory: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """The tensors of a checkpoint, from their headers alone.

    Raises UserError that names the file and the tensor when one is missing, unexpected, of another shape, or of a dtype
    other than fp32, fp16 or bf16.
    """
    tensors = headers(directory)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(
            "tensor-missing",
            f"{directory}: {missing[0]} is missing, {len(missing)} in all; take the weights that belong to its config.json",
        )
    for name, (path, dtype, shape) in sorted(tensors.items()):
        if name not in expected:
            wrong = f"{path}: {name} is unexpected; GPT-NeoX as config.json describes it has no such tensor"
            raise UserError("tensor-unexpected", wrong)
        if shape != expected[name]:
            raise UserError(
                "tensor-shape",
                f"{path}: {name} has the shape {list(shape)}, config.json says {list(expected[name])}; "
                "take the weights that belong to it",
            )
        if dtype not in ("F32", "F16", "BF16"):
            wrong = f"{path}: {name} has the dtype {dtype}; save the weights as float32, float16 or bfloat16"
            raise UserError("tensor-dtype", wrong)
    return tensors


@torch.no_grad()
def load_weights_(model: GPTNeoX, directory: Path) -> None:
    """Overwrites every parameter of the model, on whatever device, with the tensor of its name, upcast exactly.

    Takes memory for one tensor at a time. Raises UserError for what `checked` refuses, before the model is changed, and
    for values that are not finite.
    """
    parameters = {file_name(name): parameter for name, parameter in model.named_parameters()}
    tensors = checked(directory, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for path in sorted({stored.file for stored in tensors.values()}):
        with opened(path) as file:
            for name in (name for name, stored in tensors.items() if stored.file == path):
                fill_(parameters[name], tensor_files.read(path, name, file))


def load_pretrained(path: str | Path, gelu: Literal["erf", "tanh"] | None = None) -> GPTNeoX:
    """A model on the CPU, fp32, from a folder or `hub-id[@revision]`. `gelu` overrides the file's form (D9)."""
    directory = resolve(str(path))
    arch = read_architecture(directory)
    with torch.device("meta"):
        model = GPTNeoX(replace(arch, gelu=gelu or arch.gelu))
    model.to_empty(device="cpu")
    load_weights_(model, directory)
    return model


def end_of_document(tokenizer: Path, eod: str, vocab_size: int) -> int:
    """The id of the token `eod` in a `tokenizer.json`. Raises UserError when it has none, or ids beyond vocab_size."""
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(tokenizer.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for content that it cannot read
        raise UserError(
            "tokenizer-broken", f"{tokenizer}: not a tokenizer.json ({error}); give the one that made the shards"
        ) from error
    largest = max(loaded.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            "tokenizer-beyond-model",
            f"{tokenizer}: has the id {largest}, the model {vocab_size} rows; give the model's tokenizer",
        )
    if (token := loaded.token_to_id(eod)) is None:
        raise UserError("eod-unknown", f"{tokenizer}: has no token {eod!r}; name its end-of-document token")
    return token


def config_json(arch: Architecture, eod_id: int | None) -> dict[str, Any]:
    """`config.json` in the spellings of transformers 4 (from 4.30 on) and 5 at once."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **{theirs: getattr(arch, ours) for ours, theirs in SIZES.items()},
        "hidden_act": "gelu" if arch.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": arch.norm_eps,
        "use_parallel_residual": arch.parallel_residual,
        "rotary_pct": arch.rotary_fraction,
        "rotary_emb_base": arch.rotary_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": arch.rotary_base,
            "partial_rotary_factor": arch.rotary_fraction,
        },
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "torch_dtype": "float32",
        "dtype": "float32",
        **({OLD_ROWS: arch.old_rows} if arch.old_rows else {}),
    }


def save_pretrained(
    model: GPTNeoX,
    path: str | Path,
    tokenizer: Path | None = None,
    eod: str = "<|endoftext|>",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    files: dict[str, bytes] | None = None,
) -> None:
    """`save_tensors` of a model."""
    parameters = {file_name(name): parameter for name, parameter in model.named_parameters()}
    save_tensors(parameters.__getitem__, model.arch, path, tokenizer, eod, max_shard_bytes, files)


def save_tensors(
    tensor: Callable[[str], Tensor],
    arch: Architecture,
    path: str | Path,
    tokenizer: Path | None = None,
    eod: str = "<|endoftext|>",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    files: dict[str, bytes] | None = None,
) -> None:
    """Writes `config.json`, fp32 safetensors and, if given, the tokenizer, for `transformers` and `load_pretrained`.

    The folder appears whole or not at all. tensor: a name in a Hugging Face checkpoint -> its fp32 values, of which one
    is in memory at a time; tokenizer: a `tokenizer.json`, copied byte for byte; eod: its end-of-document token; files:
    {name: content} that go beside, such as a README.md. Raises UserError when `path` exists and is not an empty folder.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError("output-exists", f"{path}: exists; name a new folder, or remove it")
    eod_id = None if tokenizer is None else end_of_document(tokenizer, eod, arch.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        tensor_files.write(temporary, shapes(arch), tensor, max_shard_bytes)
        write_json(temporary / "config.json", config_json(arch, eod_id))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
                "model_max_length": arch.max_positions,
                "clean_up_tokenization_spaces": False,
                **dict.fromkeys(("bos_token", "eos_token", "unk_token"), eod),
            }
            write_json(temporary / "tokenizer_config.json", settings)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        for file in temporary.iterdir():
            sync_file(file)
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

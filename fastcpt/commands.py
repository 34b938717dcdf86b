"""The commands on models: what is measured, written, averaged and extended once there are weights (see `cli.py`)."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastcpt import UserError
from fastcpt.config import Count

# What it does, what declares its options, what does it.
Command = tuple[str, Callable[[argparse.ArgumentParser], None] | None, Callable[[argparse.Namespace], int]]
MODEL = "a checkpoint, a run (its newest), or a Hugging Face model"


def _named(option: str, entries: Iterable[str]) -> list[tuple[str, str]]:
    """NAME=DIR -> (name, folder)."""
    pairs = []
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path:
            raise UserError("data-not-name-and-folder", f"{option} {entry}: write it as NAME=DIR")
        pairs.append((name, path))
    return pairs


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-len", type=int, default=2048, metavar="T", help="tokens a sequence (default: 2048)")
    parser.add_argument("--tokens", type=Count.parse, metavar="N", help="tokens of each set (default: all)")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="B", help="sequences at once (default: 8)")


def _add_ema(parser: argparse.ArgumentParser, whose: str = "its") -> None:
    parser.add_argument("--ema", action="store_true", help=f"take the moving average of {whose} weights (train.ema)")


def _eval(arguments: argparse.Namespace) -> int:
    from fastcpt import evaluation

    results = evaluation.evaluate_checkpoint(
        arguments.checkpoint, dict(_named("--data", arguments.data)), arguments.seq_len, arguments.tokens,
        arguments.micro_batch, arguments.ema,
    )  # fmt: skip
    width = max(len("set"), *map(len, results))
    print(f"{'set':<{width}}  {'loss':>8}  {'bits/byte':>9}  {'tokens':>12}")
    for name, entry in results.items():
        print(f"{name:<{width}}  {entry['loss']:>8.4f}  {entry['bits_per_byte']:>9.4f}  {entry['tokens']:>12,}")
    return 0


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=MODEL)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="shard sets")
    _add_evaluation(parser)
    _add_ema(parser)


def _export(arguments: argparse.Namespace) -> int:
    from fastcpt.export import export

    where = export(arguments.checkpoint, arguments.output, arguments.push, arguments.ema)
    print(f"{where}: a Hugging Face model, fp32; AutoModelForCausalLM.from_pretrained reads it")
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run (its newest)")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--push", metavar="HUB_ID", help="upload it to the Hugging Face Hub as well, as a private model"
    )
    _add_ema(parser)


def _merge(arguments: argparse.Namespace) -> int:
    from fastcpt.merge import merge

    shares = merge(
        arguments.checkpoints, arguments.output, arguments.method, arguments.weights, arguments.decay, arguments.ema
    )
    width = max(len(source) for source, _ in shares)
    for source, share in shares:
        print(f"{source:<{width}}  {share:.6f}")
    print(f"{arguments.output}: their average, a Hugging Face model, fp32")
    return 0


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=MODEL)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--method", choices=("linear", "slerp"), default="linear", help="slerp: of two, as vectors on a sphere"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--weights", nargs="+", type=float, metavar="W", help="one a model (default: all alike)")
    how.add_argument(
        "--decay", choices=("linear", "cosine", "1-sqrt"),
        help="the weights that emulate this decay over checkpoints at a constant rate (arXiv 2507.17634)",
    )  # fmt: skip
    _add_ema(parser, "their")


def _interpolate(arguments: argparse.Namespace) -> int:
    from fastcpt.merge import interpolate, write_csv

    sets = [
        (name, role, path)
        for role in ("upstream", "downstream", "other")
        for name, path in _named(f"--{role}".replace("other", "data"), getattr(arguments, role) or ())
    ]
    if not sets:
        raise UserError(
            "option-missing", "interpolate: name shard sets with --upstream, --downstream or --data NAME=DIR"
        )
    rows = interpolate(
        arguments.base, arguments.continued, arguments.points, sets,
        arguments.seq_len, arguments.tokens, arguments.micro_batch, arguments.ema,
    )  # fmt: skip
    print(table(rows))
    if arguments.csv:
        write_csv(Path(arguments.csv), rows)
    return 0


def table(rows: Sequence[dict[str, float]]) -> str:
    """Numbers under the names of the first row's columns."""
    lines = [list(rows[0]), *([f"{value:.4f}" for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) for line in lines)


def _points(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _add_interpolate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=MODEL)
    parser.add_argument("continued", metavar="CONTINUED", help="what it became, likewise")
    parser.add_argument(
        "--points", type=_points, default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="W,...",
        help="weights of CONTINUED (default: 0,0.25,0.5,0.75,1)",
    )  # fmt: skip
    parser.add_argument("--upstream", nargs="+", metavar="NAME=DIR", help="shard sets that measure forgetting")
    parser.add_argument("--downstream", nargs="+", metavar="NAME=DIR", help="those that measure adaptation")
    parser.add_argument("--data", nargs="+", dest="other", metavar="NAME=DIR", help="others")
    parser.add_argument("--csv", metavar="FILE", help="write the table there as well")
    _add_evaluation(parser)
    _add_ema(parser, "CONTINUED's")


def _extend(arguments: argparse.Namespace) -> int:
    from fastcpt.extend import extend

    made = extend(
        arguments.model, arguments.output, arguments.text, arguments.add, arguments.tokenizer,
        arguments.init, arguments.text_key, arguments.seed,
    )  # fmt: skip
    if made.size:
        before, after = made.before / made.size, made.after / made.size
        print(f"{before:.4f} -> {after:.4f} tokens a byte of the text, {1 - after / before:.1%} fewer")
    print(f"{arguments.output}: {made.tokens:,} new tokens, {made.rows:,} rows; a Hugging Face model, fp32")
    return 0


def _add_extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--text", nargs="+", metavar="INPUT", help="text of the new language, as `prep` reads it")
    parser.add_argument("--add", type=int, metavar="N", help="merges to learn on it, a new token each")
    parser.add_argument("--tokenizer", metavar="T", help="instead, one that was extended elsewhere")
    parser.add_argument(
        "--init", choices=("subtokens", "mean", "noise"), default="subtokens",
        help="new rows: the mean of those of a token's old parts (default), of all, or noise",
    )  # fmt: skip
    parser.add_argument("--text-key", default="text", metavar="KEY", help="where a record's text is (default: text)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")


COMMANDS: dict[str, Command] = {
    "eval": ("loss and bits per byte of a model on shard sets", _add_eval, _eval),
    "export": ("write a checkpoint as a Hugging Face model, or push it to the hub", _add_export, _export),
    "merge": ("average the weights of checkpoints, also as a decay", _add_merge, _merge),
    "interpolate": ("what is forgotten and learned on the way between two models", _add_interpolate, _interpolate),
    "extend": ("teach a tokenizer new tokens, and give the model rows for them", _add_extend, _extend),
}

"""The `fastcpt` command. Each command imports what it needs when it runs, so that --help starts without torch."""

import argparse
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastcpt import UserError, __version__, commands
from fastcpt.config import Count, fields


def _prep(arguments: argparse.Namespace) -> int:
    from fastcpt.data_prep import engines

    if arguments.engine == "local" and arguments.workers != 1:
        engines.start_server()  # while this process imports the rest
    from fastcpt.data_prep.pretokenize import prep

    prep(
        arguments.inputs,
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        workers=arguments.workers,
        engine=arguments.engine,
        ray_address=arguments.ray_address,
        text_key=arguments.text_key,
        group_key=arguments.group_key,
        eod=arguments.eod,
        shard_tokens=arguments.shard_tokens,
        val_fraction=arguments.val_fraction,
        dedup=arguments.dedup,
        on_error=arguments.on_error,
        backend=arguments.tokenizer_backend,
    )
    return 0


def _add_prep(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fastcpt prep INPUT... --tokenizer FILE|HUB_ID --output DIR [options]"
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="file, folder or pattern: jsonl[.gz|.zst] parquet txt"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="T", help="tokenizer.json, its folder, or hub-id[@revision]"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the new shard set; validation goes to DIR-val")
    parser.add_argument("--workers", type=int, metavar="N", help="tasks at once (default: one a CPU)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where tasks run")
    parser.add_argument("--ray-address", metavar="A", help="the Ray cluster's head (default: RAY_ADDRESS, or one here)")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="where a record's text is (default: text)")
    parser.add_argument("--group-key", metavar="KEY", help="make one set for each value of this key, DIR-VALUE")
    parser.add_argument("--eod", metavar="TOKEN", help="end-of-document token (default: the tokenizer's own)")
    parser.add_argument(
        "--shard-tokens", type=Count.parse, default=Count(10**9), metavar="N", help="tokens a .bin file (default: 1e9)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="share of documents for validation"
    )
    parser.add_argument("--dedup", action="store_true", help="keep the first of documents with the same text")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="broken documents: stop, or count")
    parser.add_argument(
        "--tokenizer-backend", choices=("gigatoken", "tokenizers"), default="gigatoken", help="same ids"
    )


def _convert(arguments: argparse.Namespace) -> int:
    from fastcpt.data_prep.convert import convert

    manifest = convert(
        arguments.inputs,
        source=arguments.source,
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        eod=arguments.eod,
        dtype=arguments.dtype,
        append_eod=arguments.append_eod,
        shard_tokens=arguments.shard_tokens,
    )
    print(f"{manifest['path']}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fastcpt convert INPUT... --source FORMAT --tokenizer FILE|HUB_ID --output DIR [options]"
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or pattern, in this order")
    parser.add_argument(
        "--source", required=True, choices=("nanogpt", "llmc", "megatron", "pythia", "datatrove", "olmo"), help="format"
    )
    parser.add_argument("--tokenizer", required=True, metavar="T", help="the one that made the ids, as in `prep`")
    parser.add_argument("--output", required=True, metavar="DIR", help="the new shard set")
    parser.add_argument("--eod", metavar="TOKEN", help="end-of-document token (default: the tokenizer's own)")
    parser.add_argument("--append-eod", action="store_true", help="add it where a document ends without it")
    parser.add_argument(
        "--dtype", choices=("uint16", "uint32"), help="of files that do not say: nanogpt olmo datatrove"
    )
    parser.add_argument(
        "--shard-tokens", type=Count.parse, default=Count(10**9), metavar="N", help="tokens a .bin file (default: 1e9)"
    )


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.step is not None:
        from fastcpt.provenance import trace

        print(trace(arguments.path, arguments.step, arguments.decode))
    else:
        from fastcpt.data_prep.inspect_shards import inspect

        print(inspect(arguments.path, arguments.decode))
    return 0


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", help="a shard set; with --step, a run")
    parser.add_argument(
        "--decode", type=int, default=0, metavar="N", help="print the first N documents or samples as text"
    )
    parser.add_argument("--step", type=int, metavar="N", help="the documents that a run's step N was trained on")


def _verify(arguments: argparse.Namespace) -> int:
    from fastcpt import shards

    path = Path(arguments.path)
    if (path / shards.MANIFEST).exists() and not (path / "state.json").exists() and "step-" not in path.name:
        from fastcpt.data_prep.inspect_shards import verify

        verify(path)
        print(f"{path}: every byte is as its manifest says")
        return 0
    from fastcpt import checkpoint

    found = [path / "checkpoints" / f"step-{step}" for step in checkpoint.steps(path)] or [path]
    from fastcpt.progress import Bar

    total = sum(file.stat().st_size for each in found if each.is_dir() for file in each.iterdir())
    done = 0
    with Bar("verify", total) as bar:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar.update(done)

        for each in found:
            checkpoint.verify(each, progress)
            bar.print(f"{each}: every byte is as its manifest says")
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a shard set, a checkpoint, or a run (all its checkpoints)")


def _train(arguments: argparse.Namespace) -> int:
    from fastcpt import train

    return train.main(arguments.rest)


def _sweep(arguments: argparse.Namespace) -> int:
    from fastcpt import sweep

    return sweep.run(arguments.file, arguments.jobs, arguments.slurm, arguments.dry_run)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains what is missing of a grid of runs, and writes their evaluations to OUTPUT/results.csv."
    parser.add_argument("file", metavar="FILE", help="the sweep's file: fastcpt/grid.py says how it is written")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one a GPU, or one)")
    parser.add_argument(
        "--slurm", metavar="NAME=VALUE,...", help="submit to Slurm: partition=gpu,gpus_per_node=8,timeout_min=600,..."
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs that are missing, and how to start each")


def _report(arguments: argparse.Namespace) -> int:
    if [Path(run).suffix for run in arguments.runs] == [".yaml"]:
        from fastcpt.sweep_page import sweep_report

        if arguments.control is not None:
            raise UserError(
                "options-wrong", "--control is of runs; arms of a sweep are compared with the first of a figure"
            )
        written = sweep_report(arguments.runs[0], arguments.output)
    else:
        from fastcpt.report import report

        written = report(arguments.runs, arguments.output, arguments.control)
    for path in written:
        print(path)
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, one arm each; or one sweep's FILE.yaml")
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page; figures go beside it")
    parser.add_argument(
        "--control",
        metavar="RUN",
        help="the run that went on with upstream text: forgetting against it, at equal tokens",
    )


def _plan(arguments: argparse.Namespace) -> int:
    from fastcpt import plan

    return plan.main(arguments.rest)


def _bench(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output) if arguments.output else None
    if arguments.what == "prep":
        from fastcpt.benchmarks import bench_prep

        if arguments.tokenizer is None:
            raise UserError("option-missing", "bench prep: name the tokenizer with --tokenizer FILE")
        bench_prep.main(
            arguments.tokenizer,
            Path(arguments.text) if arguments.text else None,
            output,
            Path(arguments.work),
            arguments.rivals_python or sys.executable,
            arguments.megabytes,
            arguments.share,
            arguments.about_text,
        )
    elif arguments.what == "train":
        from fastcpt.benchmarks import bench_train

        bench_train.main(output, arguments.model, arguments.rivals_python or sys.executable)
    elif arguments.what == "data":
        from fastcpt.benchmarks import bench_data

        bench_data.main(output)
    elif arguments.what == "overheads":
        from fastcpt.benchmarks import bench_overheads

        bench_overheads.main(output)
    elif arguments.what == "predictions":
        from fastcpt.benchmarks import predictions

        predictions.main(output)
    elif arguments.static:
        from fastcpt.benchmarks import static

        static.main(output)
    else:
        from fastcpt.benchmarks import bench_kernels

        bench_kernels.main(output)
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["kernels", "train", "prep", "data", "overheads", "predictions"],
        help="kernels: times beside their rivals; on CPU those that have a path of their own; train: the training step, "
        "prep: `fastcpt prep`, likewise; data: reading; overheads: what a run does beside its model, and before its first "
        "step; predictions: those of `fastcpt plan --gpu` beside published runs",
    )
    parser.add_argument(
        "--static", action="store_true", help="instead, without a GPU: registers, spills, access widths, bytes moved"
    )
    parser.add_argument("--output", metavar="FOLDER", help="write the tables there as CSV files")
    parser.add_argument("--model", action="append", metavar="NAME", help="train: only this model; may be repeated")
    prep = parser.add_argument_group("prep")
    prep.add_argument("--tokenizer", metavar="T", help="tokenizer.json, its folder, or hub-id[@revision]")
    prep.add_argument("--text", metavar="FOLDER", help="text files of any kind (default: those of this Python)")
    prep.add_argument("--about-text", metavar="WORDS", help="what that text is, for the record")
    prep.add_argument("--megabytes", type=float, default=1000, metavar="MB", help="of text (default: 1000)")
    prep.add_argument("--share", type=float, default=1.0, metavar="F", help="of it for the slow rivals (default: 1)")
    prep.add_argument(
        "--rivals-python", metavar="FILE", help="an interpreter that has the rivals, of train too (default: this one)"
    )
    prep.add_argument(
        "--work", default="bench-prep", metavar="DIR", help="corpus, and what is done (default: bench-prep)"
    )


def _demo(arguments: argparse.Namespace) -> int:
    from fastcpt import demo

    return demo.run(Path(arguments.output), quick=arguments.quick)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a much shorter run, to see that everything works")
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything goes (default: demo)")


COMMANDS: dict[str, commands.Command] = {
    "prep": ("tokenize text into shards", _add_prep, _prep),
    "convert": ("turn token files of other projects into shards", _add_convert, _convert),
    "inspect": ("say what a shard set holds, or what a step was trained on", _add_inspect, _inspect),
    "verify": ("compare every byte with its hash: shards, checkpoints, runs", _add_verify, _verify),
    "plan": ("what a run will cost before it starts", None, _plan),
    "train": ("pre-train or continue pre-training; under torchrun too", None, _train),
    **commands.COMMANDS,
    "sweep": ("train what is missing of a grid of runs, here or on Slurm", _add_sweep, _sweep),
    "report": ("figures and one HTML page out of runs, or of a sweep", _add_report, _report),
    "bench": ("measure this machine", _add_bench, _bench),
    "demo": ("the whole story on text that comes with Python", _add_demo, _demo),
}


def configured_help(command: str) -> str:
    """One screen for `train` and `plan`: all settings, from the dataclasses that define them."""
    sections: dict[str, list[str]] = {}
    for name, _ in fields():
        section, _, rest = name.partition(".")
        if "[]" not in rest:
            sections.setdefault(section, []).append(rest)
    lines = [
        textwrap.fill(" ".join(names), 110, initial_indent=f"  --{section + '.':<10} ", subsequent_indent=" " * 15)
        for section, names in sections.items()
    ]
    usage = {
        "train": (
            "usage: fastcpt train --config FILE [--section.field VALUE ...]",
            "       torchrun --nproc_per_node=N -m fastcpt.train --config FILE [--section.field VALUE ...]",
            "", "Started again with the same run.output, a run goes on from its newest checkpoint.",
        ),
        "plan": (
            "usage: fastcpt plan --config FILE [--gpus N] [--per-machine M] [--memory GIB] [--gpu NAME [--price P]]",
            "                    [--priority new|balanced|old] [--budget TOKENS] [--shift] [--without-data]",
            "                    [--section.field VALUE ...]",
            "       fastcpt plan --table", "",
            "Tokens, steps, epochs, memory, checkpoints, the learning-rate curve, warnings. Nothing is written.",
            "With --gpu a100-40, a100, h100, h200 or b200 also tokens/s, hours and GPU-hours; --price is of a GPU-hour.",
            "--priority: the peak rate that suits it; --budget: if compute ends before the run; --shift: the start is",
            "evaluated on the validation sets, to tell a weak shift from a strong one and the replay that it asks for.",
            "--without-data: sets and start are not opened. --table: tokens/s of every Pythia on 1, 8, 64 and 512 of each.",
        ),
    }[command]  # fmt: skip
    return "\n".join((
        *usage, "",
        "settings, in the YAML file or as an option:", *lines, "",
        "README.md describes each; `fastcpt train --config FILE --print_config` prints a file with all of them.",
    ))  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Wrong options are mistakes like any other: one line, with an id."""

    def error(self, message: str) -> NoReturn:
        raise UserError("options-wrong", f"{message}; `{self.prog} --help` says what there is")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake of the user's (one line says which), others of training (`train.CODES`)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # decoded text on a terminal that cannot show it
    try:
        return _do(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"fastcpt: {error.line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        return 0


def _do(arguments: list[str]) -> int:
    if arguments[:1] in (["train"], ["plan"]):  # their options are the configuration's fields
        if not arguments[1:] or {"-h", "--help"} & set(arguments):
            print(configured_help(arguments[0]))
            return 0
        return COMMANDS[arguments[0]][2](argparse.Namespace(rest=arguments[1:]))
    parser = Parser("fastcpt", description="Continual pre-training of GPT-NeoX / Pythia models.")
    parser.add_argument("--version", action="version", version=f"fastcpt {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (summary, add, function) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if add is not None:
            add(command)
        command.set_defaults(function=function)
    parsed = parser.parse_args(arguments)
    return int(parsed.function(parsed))


if __name__ == "__main__":
    sys.exit(main())

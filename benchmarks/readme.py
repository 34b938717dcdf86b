"""Writes the generated parts of README.md and README.zh.md, so that no number in them is typed.

    python -m fastcpt.benchmarks.readme                  from what is committed
    python -m fastcpt.benchmarks.readme --demo demo      and first take over the result of a demo's folder

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`. Run it in the root of a checkout.
"""

import argparse
import csv
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from fastcpt.config import fields
from fastcpt.metrics import console_line

RESULT = Path("benchmarks/results/demo.json")
FIGURE = Path("benchmarks/results/demo.png")


def take_over(demo: Path) -> None:
    """Copies what the READMEs show of a demo: each run's last evaluation, two log lines, and a figure of its report."""
    runs = {}
    for name in ("pretrain", "continue", "replay"):
        lines = [json.loads(line) for line in (demo / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        training = [line for line in lines if "loss" in line]
        runs[name] = {"training": training[-1], "evaluation": [line for line in lines if "eval" in line][-1]}
    RESULT.write_text(json.dumps(runs, indent=1) + "\n")
    shutil.copy(demo / "report-figures" / "plane.png", FIGURE)


def demo_table() -> str:
    runs = json.loads(RESULT.read_text())
    titles = {"pretrain": "pre-trained on English", "continue": "+ code, no replay", "replay": "+ code, 25% replay"}
    rows = ["| | English loss | code loss | forgetting | adaptation |", "|---|---|---|---|---|"]
    for name, title in titles.items():
        line = runs[name]["evaluation"]
        english, code = line["eval"]["english"]["loss"], line["eval"]["code"]["loss"]
        changes = ["", ""] if name == "pretrain" else [f"{line[key]:+.3f}" for key in ("forgetting", "adaptation")]
        rows.append(f"| {' | '.join([title, f'{english:.3f}', f'{code:.3f}', *changes])} |")
    return "\n".join(rows)


def log_lines() -> str:
    """The last training line and evaluation line of the demo's run with replay, as the console shows them."""
    run = json.loads(RESULT.read_text())["replay"]
    total = run["training"]["step"]
    return "\n".join(f"    {console_line(run[kind], total)}" for kind in ("training", "evaluation"))


def config_table() -> str:
    rows = ["| setting | |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {text} |" for name, text in fields())])


def lm_eval_table() -> str:
    """What lm_eval printed for the demo's export; benchmarks/results/lm_eval.txt is its output as it came."""
    return Path("benchmarks/results/lm_eval.txt").read_text().rstrip("\n")


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULT.parent / name).open() as file:
        return list(csv.DictReader(file))


def _numbers(name: str, left_out: tuple[str, ...] = ()) -> str:
    """A table of numbers, one a row; left_out: how cases begin that are not shown."""
    rows = _rows(name)
    out = [f"| {rows[0]['device']} | | | target |", "|---|---|---|---|"]
    for row in rows:
        if not row["case"].startswith(left_out):
            value = float(row["value"])
            number = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            out.append(f"| {row['what']} | {row['case']} | {number} {row['unit']} | {row['target']} |")
    return "\n".join(out)


def kernels_table() -> str:
    """Of each kernel, over all that the presets launch: the most registers of a chip, spills, and its narrow accesses."""
    rows, chips = _rows("kernels_static.csv"), ("80", "90", "100")
    out = ["| kernel | variants | registers, sm_80 / 90 / 100 | spills |", "|---|---|---|---|"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        registers = [max(int(row["registers"]) for row in own if row["sm"] == chip) for chip in chips]
        variants = len({(row["arguments"], row["warps"]) for row in own})
        spills = sum(int(row["spills"]) for row in own)
        out.append(f"| `{kernel}` | {variants} | {' / '.join(map(str, registers))} | {spills} |")
    return "\n".join(out)


def traffic_table() -> str:
    """Bytes of each kernel's own loads and stores, beside the least that must reach memory."""
    out = ["| | floor | loads + stores | of them to memory | the rest |", "|---|---|---|---|---|"]
    for row in _rows("kernels_traffic.csv"):
        moved = f"{float(row['loads']):.2f} + {float(row['stores']):.2f}"
        out.append(
            f"| {row['what']} | {float(row['floor']):g} bytes a {row['unit']} | {moved} | {float(row['dram']):.2f} | {row['reason']} |"
        )
    return "\n".join(out)


def kernels_cpu_table() -> str:
    """Times beside rivals of the kernels that have a path of their own on CPU."""
    rows = [row for row in _rows("kernels_cpu.csv") if row["ratio_to_ours"]]
    out = [f"| {rows[0]['device']}, torch {rows[0]['torch']} | | median | times ours |", "|---|---|---|---|"]
    for row in rows:
        case = f"{row['kernel']}: {row['case']}, {row['shape']}, {row['dtype']}"
        time, ratio = f"{float(row['median_ms']):.0f} ms", f"{float(row['ratio_to_ours']):.2f}"
        out.append(f"| {case} | {row['implementation']} | {time} | {ratio} |")
    return "\n".join(out)


def prep_table() -> str:
    """Preparation beside its rivals, on each format."""
    rows = _rows("prep.csv")
    titles = {
        "bare": "gigatoken alone, nothing kept",
        "tokenizers": "`tokenizers` in a pool of processes",
        "megatron": "as Megatron's and GPT-NeoX's script",
        "nanogpt": "as nanoGPT's script: `datasets`, tiktoken",
        "datatrove": "datatrove's DocumentTokenizer",
    }
    out = [f"| {rows[0]['device']}, {rows[0]['workers']} processes | | MB | MB/s | M tokens/s | time to ours, a MB |"]
    out.append("|---|---|---|---|---|---|")
    for row in rows:
        name = titles.get(row["implementation"], f"`{row['implementation']}`")
        speed, tokens = f"{float(row['mb_per_s']):.1f}", f"{float(row['tokens_per_s']) / 1e6:.2f}"
        out.append(
            f"| {name} | .{row['form']} | {float(row['text_mb']):.0f} | {speed} | {tokens} | {float(row['ratio_to_ours']):.2f} |"
        )
    return "\n".join([*out, "", f"{rows[0]['text']}."])


def train_table() -> str:
    """The training step beside its rivals', a model after the other."""
    rows = _rows("train.csv")
    out = [
        f"| {rows[0]['device']}, torch {rows[0]['torch']} | | tokens/s | ours to it | of matmul, full / causal | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["implementation"] == "fastcpt"
        share = f"{float(row['mfu_full']):.0f}% / {float(row['mfu_causal']):.0f}%"
        ratio = "" if ours else f"{float(row['ratio_to_ours']):.2f}x"
        out.append(
            f"| {row['case']} | {row['implementation']} | {float(row['tokens_per_s']):,.0f} | {ratio} | {share} "
            f"| {float(row['peak_mb']):,.0f} |"
        )
    return "\n".join(out)


# Of a profile: what a column of the table counts, by how the names of operators begin.
PROFILED = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "softmax, maxima": ("aten::_softmax", "aten::amax"),
    "copies": ("aten::copy_",),
    "compiled element-wise": ("## Call CompiledFxGraph",),
    "AdamW": ("aten::_fused_adamw_", "Optimizer.step"),
}


def profile_table() -> str:
    """Where the time of fastcpt's step goes, by operator, attention and loss among them."""
    out = [f"| | {' | '.join(PROFILED)} | all else |", "|" + "---|" * (len(PROFILED) + 2)]
    for case in dict.fromkeys(row["case"] for row in _rows("train.csv")):
        operators = json.loads((RESULT.parent / f"train_{case}.json").read_text())["table"]
        shares = [sum(share for name, share, _ in operators if name.startswith(own)) for own in PROFILED.values()]
        cells = " | ".join(f"{share:.0%}" for share in (*shares, 1 - sum(shares)))
        out.append(f"| {case} | {cells} |")
    return "\n".join(out)


def data_table() -> str:
    """What reading costs, of the larger batches alone."""
    return _numbers("data.csv", left_out=("8 x 1024", "64 x 1024", "8 x 2048"))


def overheads_table() -> str:
    """What a run does beside its model."""
    return _numbers(
        "overheads.csv", left_out=("block by block: nothing compiled before,", "block by block: compiled before,")
    )


def predictions_table() -> str:
    """Predicted speeds beside published ones: of each source and device how many rows, and their errors."""
    rows = _rows("predictions.csv")
    out = ["| | | rows that fit | rows that test | their errors | median, without sign |", "|---|---|---|---|---|---|"]
    groups = {key: key for key in ((row["source"], row["device"]) for row in rows)} | {("all", ""): None}
    for (source, device), key in groups.items():
        own = [row for row in rows if key in (None, (row["source"], row["device"]))]
        errors = [float(row["error"]) for row in own if row["used_for"] == "test"]
        if errors:
            span = f"{min(errors):+.0%} to {max(errors):+.0%}" if len(errors) > 1 else f"{errors[0]:+.0%}"
            median = f"{statistics.median(map(abs, errors)):.0%}"
            out.append(f"| {source} | {device} | {len(own) - len(errors)} | {len(errors)} | {span} | {median} |")
    return "\n".join(out)


PARTS: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "log": log_lines,
    "lm_eval": lm_eval_table,
    "config": config_table,
    "data": data_table,
    "overheads": overheads_table,
    "kernels": kernels_table,
    "traffic": traffic_table,
    "kernels_cpu": kernels_cpu_table,
    "train": train_table,
    "profile": profile_table,
    "prep": prep_table,
    "predictions": predictions_table,
}


def update(text: str) -> str:
    """The document with its generated parts made anew."""
    for name, make in PARTS.items():
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        assert opening and closing, f"there is no part {name}"
        text = f"{before}{opening}{make()}\n{closing}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated parts of the READMEs.")
    parser.add_argument("--demo", type=Path, help="a folder that `fastcpt demo` made")
    arguments = parser.parse_args()
    if arguments.demo:
        take_over(arguments.demo)
    for path in (Path("README.md"), Path("README.zh.md")):
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

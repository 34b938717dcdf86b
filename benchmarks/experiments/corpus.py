"""Text of Debian packages as the shards of the experiments: upstream A, a weak shift B, a strong shift C.

    python benchmarks/experiments/corpus.py FOLDER

A  English: the documentation of Linux, and Perl's           34 MB
B  English, near A: the documentation of Python               11 MB
C  Chinese: manual pages and the Debian reference              7 MB

Tokens are bytes. Every document is there once; 3% to 8% of them, over a quarter of a million bytes of each set, are for
validation. Wants apt and dpkg.
"""

import gzip
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastcpt.data_prep.pretokenize import prep

EOD = "<|endoftext|>"
VALIDATION = {"a": 0.03, "b": 0.04, "c": 0.08}
# Set -> (package, which of its files). Names of packages are Debian 12's.
SOURCES: dict[str, list[tuple[str, str]]] = {
    "a": [("linux-source-6.1", "Documentation/**/*.rst"), ("linux-source-6.1", "Documentation/**/*.txt"),
          ("perl-doc", "usr/share/perl/**/*.pod")],
    "b": [("python3.11-doc", "usr/share/doc/**/*.rst.txt")],
    "c": [("manpages-zh", "usr/share/man/zh_CN/**/*.gz"), ("debian-reference-zh-cn", "usr/share/**/*.zh-cn.txt.gz")],
}  # fmt: skip


def unpack(package: str, folder: Path) -> Path:
    """The package's files, below a folder of its own; of the kernel's source its documentation."""
    where = folder / package
    if not where.exists():
        subprocess.run(["apt-get", "download", "--quiet", package], cwd=folder, check=True)
        file = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "--extract", file, where], check=True)
        for archive in where.glob("usr/src/*.tar.xz"):
            with tarfile.open(archive) as tar:
                inside = (each for each in tar if "/Documentation/" in each.name)
                tar.extractall(where / "source", members=inside, filter="data")
    return where


def documents(name: str, folder: Path) -> Iterator[str]:
    """In the order of their paths; translations of Linux's documentation are another language."""
    for package, pattern in SOURCES[name]:
        root = unpack(package, folder)
        top = next((root / "source").iterdir()) if (root / "source").exists() else root
        for path in sorted(top.glob(pattern)):
            if "translations" not in path.parts and path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                yield (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")


def byte_tokenizer(path: Path) -> None:
    """A tokenizer whose tokens are bytes: the losses of all three sets are nats a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([EOD, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOD])
    tokenizer.save(str(path))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    byte_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        for name in SOURCES:
            file = folder / f"{name}.jsonl"
            with file.open("w", encoding="utf-8") as lines:
                for text in documents(name, Path(scratch)):
                    lines.write(json.dumps({"text": text}) + "\n")
            prep([str(file)], tokenizer=str(tokenizer), output=folder / name, val_fraction=VALIDATION[name], dedup=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

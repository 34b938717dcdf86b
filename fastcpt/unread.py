"""What `fastcpt plan --without-data` knows of a run whose sets and start are not there: what its configuration says."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastcpt import UserError
from fastcpt.config import Config
from fastcpt.data import Mixture
from fastcpt.evaluation import NamedSet
from fastcpt.lineage import Inputs, Origin, make_phases, make_plan
from fastcpt.model import resolve_architecture
from fastcpt.shards import ShardSet

MISSING = (
    "the sizes of the sets and the passes over them; what the model has read of them, and so which windows are replayed and "
    "whether it is re-warmed on what it knows; whether tokenizers and ids fit. The architecture is that of the section model, "
    "and each validation set is taken to have run.eval_tokens"
)


class UnreadSet(ShardSet):
    """A set that was not opened: as large as any run needs, so that nothing of it is repeated."""

    def __init__(self, path: str) -> None:
        self.path, self.fingerprint, self.dtype = Path(path), path, np.dtype(np.uint16)
        self.vocab_size, self.manifest = 0, {"tokenizer": {"fingerprint": ""}}

    def __len__(self) -> int:
        return 0

    def num_windows(self, seq_len: int) -> int:
        return 2**40


def is_preset(arguments: Sequence[str], config: Config) -> bool:
    """Whether a run is one of the presets as it is, and none of its sets is there: nobody mistyped a path of it."""
    named = [arguments[index + 1] for index, each in enumerate(arguments[:-1]) if each == "--config"]
    named += [each.removeprefix("--config=") for each in arguments if each.startswith("--config=")]
    paths = [source.path for source in config.data.train] + [entry.path for entry in config.data.val]
    own = any(Path(name).is_file() for name in named) or any(each.startswith("--data.") for each in arguments)
    return not own and not config.init.branch and not any(Path(path).exists() for path in paths)


def inputs(config: Config) -> Inputs:
    """As `lineage.prepare` returns it, of the configuration alone. Raises UserError for what it alone does not say."""
    data = config.data
    if config.init.branch:
        raise UserError(
            "plan-of-a-branch",
            "--without-data: a branch starts at its checkpoint's rate and position; leave the option out",
        )
    arch = resolve_architecture(config.model, None, "scratch")
    arch = replace(arch, max_positions=max(arch.max_positions, data.seq_len))
    origin = Origin("scratch" if config.init.from_ == "scratch" else "pretrained", arch)
    sets: dict[str, ShardSet] = {source.name: UnreadSet(source.path) for source in data.train}
    mixture = Mixture(sets, make_phases(config, origin, sets), data.seq_len, config.train.seed)
    return Inputs(origin, make_plan(config, origin), mixture, {}, {})


def validation(config: Config) -> list[NamedSet]:
    windows = np.arange(-(-config.run.eval_tokens // config.data.seq_len))
    return [NamedSet(entry.name, entry.role, UnreadSet(entry.path), windows) for entry in config.data.val]

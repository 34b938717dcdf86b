"""What no single field's type says about a configuration (`config.py`, which imports this)."""

import math
from typing import Any

from fastcpt import PASSWORD, UserError
from fastcpt.units import is_length


def require(condition: bool, message: str, id: str = "setting-out-of-range") -> None:
    if not condition:
        raise UserError(id, message)


def check(config: Any) -> None:
    """config: a `config.Config`. Raises UserError."""
    data, train, run = config.data, config.train, config.run
    for name, value in (
        ("data.seq_len", data.seq_len), ("train.tokens", train.tokens),
        ("run.log_every", run.log_every), ("run.eval_every", run.eval_every), ("run.save_every", run.save_every),
        ("run.keep", run.keep), ("run.eval_tokens", run.eval_tokens),
    ):  # fmt: skip
        require(value >= 1, f"{name} is {value}; it must be at least 1")
    for name, value in (("run.keep_every", run.keep_every), ("run.profile", run.profile), ("run.stop_at", run.stop_at)):
        require(value >= 0, f"{name} is {value}; it must be a number of steps, or 0 for none")
    micro = train.micro_batch
    require(micro >= 0, f"train.micro_batch is {micro}; it must be at least 1, or 0 for what fits")
    require(
        train.batch_tokens >= data.seq_len and train.batch_tokens % data.seq_len == 0,
        f"train.batch_tokens {train.batch_tokens} is not a multiple of data.seq_len {data.seq_len}",
        "batch-not-whole-sequences",
    )
    require(0 < run.timeout < math.inf, f"run.timeout {run.timeout} must be above 0 seconds")
    require(run.check_every >= 0, f"run.check_every is {run.check_every}; it must be at least 0")
    spikes = 0 <= train.skip_spikes < math.inf
    require(spikes, f"train.skip_spikes {train.skip_spikes} must be a number from 0 on; 6 is usual")
    _sources(config)
    _optimization(config)


def _sources(config: Any) -> None:
    data, run = config.data, config.run
    paths = [source.path for source in data.train] + [entry.path for entry in data.val]
    for text in (run.output, run.wandb or "", config.init.from_, *paths):
        kept = f"{text}: the run's files would keep the password; write it without"
        require(not PASSWORD.search(text), kept, "url-with-password")
    require("://" not in run.output, f"run.output {run.output}: a URL; name a folder of this machine", "output-remote")
    require(len(data.train) > 0, "data.train is empty; name at least one shard set", "sources-missing")
    for entries, what in ((data.train, "data.train"), (data.val, "data.val")):
        names = [entry.name for entry in entries]
        repeated = f"{what}: the names {names} are not all different"
        require(len(set(names)) == len(names), repeated, "source-names-repeat")
    for source in data.train:
        require(
            0 < (source.weight or 0) < math.inf or (source.weight is None and len(data.phases) > 0),
            f"data.train {source.name}: weight {source.weight} is not a number above 0; to leave it out, remove the source",
            "weight-out-of-range",
        )


def _optimization(config: Any) -> None:
    optim, schedule = config.optim, config.schedule
    good = len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)
    require(good, f"optim.betas {optim.betas} must be two numbers from 0 to below 1")
    require(optim.clip > 0, f"optim.clip {optim.clip} must be above 0; a large number clips nothing")
    require(optim.eps > 0, f"optim.eps {optim.eps} must be above 0")
    require(0 <= optim.weight_decay < math.inf, f"optim.weight_decay {optim.weight_decay} is not a number from 0 on")
    lengths = {f"schedule.{name}": getattr(schedule, name) for name in ("warmup", "cooldown", "decay")}
    for name, length in {**lengths, "optim.embeddings_first": optim.embeddings_first}.items():
        wrong = f"{name} {length} is neither a fraction below 1, a whole number of steps, nor tokens such as 2B"
        require(length is None or is_length(length), wrong)
    require(
        0 <= (optim.new_rows_lr or 0) < math.inf, f"optim.new_rows_lr {optim.new_rows_lr} is not a number from 0 on"
    )
    require(0 <= schedule.min_lr_ratio <= 1, f"schedule.min_lr_ratio {schedule.min_lr_ratio} is not from 0 to 1")
    if config.init.branch:
        for good, message, id in (
            (config.init.from_ != "scratch", "init.branch needs init.from: the checkpoint to go on from",
             "branch-without-checkpoint"),
            (optim.lr is None, f"optim.lr {optim.lr}: a branch starts at its checkpoint's rate; remove optim.lr",
             "branch-learning-rate"),
            (schedule.warmup == 0, f"schedule.warmup {schedule.warmup}: a branch has no warm-up; set it to 0",
             "branch-warmup"),
        ):  # fmt: skip
            require(good, message, id)
    else:
        good = optim.lr is not None and 0 < optim.lr < math.inf
        require(good, f"optim.lr is {optim.lr}; give the peak learning rate", "learning-rate-missing")

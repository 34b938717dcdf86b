"""What is known of how a model was pre-trained: its peak learning rate and its optimizer.

A run from scratch writes it into its checkpoints, and what goes on from them keeps it (`history` in `state.json`). Of
Pythia it is published. Of other models it is not known, and said so.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports read what is known without torch
    from fastcpt.config import Config
    from fastcpt.lineage import Origin
    from fastcpt.schedules import Plan

# models/*/pythia-*.yml of github.com/EleutherAI/pythia at a19eecb: "lr" and "type": "Adam" (GPT-NeoX's decays weights as
# AdamW does); min_lr is a tenth of each. For 1b the table of its README says 3.0e-4 instead.
PEAKS = {
    "pythia-14m": 1e-3, "pythia-31m": 1e-3, "pythia-70m": 1e-3, "pythia-160m": 6e-4, "pythia-410m": 3e-4,
    "pythia-1b": 2.5e-4, "pythia-1.4b": 2e-4, "pythia-2.8b": 1.6e-4, "pythia-6.9b": 1.2e-4, "pythia-12b": 1.2e-4,
}  # fmt: skip


@dataclass(frozen=True)
class Pretraining:
    """peak: the highest learning rate; optimizer: its name; told_by: how that is known. None: not known."""

    peak: float | None = None
    optimizer: str | None = None
    told_by: str = ""

    @property
    def text(self) -> str:
        if self.optimizer is None:
            return "which optimizer pre-trained the model, and at what rate, is not known"
        return f"pre-trained by {self.optimizer} at a peak rate of {self.peak:.3g} ({self.told_by})"


def same_sizes(origin: "Origin") -> str | None:
    """The Pythia that has the model's sizes, if any."""
    from fastcpt.model import PRESETS

    sizes = ("layers", "width", "heads", "mlp_width")
    of = {name: [getattr(arch, size) for size in sizes] for name, arch in PRESETS.items()}
    return next((name for name in of if of[name] == [getattr(origin.arch, size) for size in sizes]), None)


def of(origin: "Origin", plan: "Plan") -> Pretraining:
    """plan: the run's own, which is the pre-training where it starts from scratch."""
    if origin.kind == "scratch":
        return Pretraining(plan.highest, "AdamW", "from scratch by fastcpt")
    if origin.state is not None:
        if kept := origin.state["history"].get("pretraining"):
            return Pretraining(**kept)
        if origin.state.get("config", {}).get("init", {}).get("from") == "scratch":
            return Pretraining(origin.state["plan"]["peak"], "AdamW", "from scratch by fastcpt")
        return Pretraining()
    name = same_sizes(origin)
    return Pretraining(PEAKS[name], "Adam", f"published for {name}, which has these sizes") if name else Pretraining()


def history(origin: "Origin", plan: "Plan", content: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What a checkpoint of this run says of all that its model has seen. content: see `lineage.Inputs`."""
    from fastcpt.lineage import history_of, read_before

    known = history_of(origin)
    seen = sorted({*known["seen"], *content["train"].values()})
    return {
        "complete": known["complete"],
        "seen": seen,
        "read": read_before(origin),
        "pretraining": asdict(of(origin, plan)),
    }


def fresh_moments(config: "Config", origin: "Origin") -> bool:
    return not origin.keeps_position and config.init.optimizer == "reset"


def describe(config: "Config", origin: "Origin", plan: "Plan") -> str:
    """Adam's moments at the start, and the model's pre-training. A change of optimizer would need a word of its own:
    there is AdamW alone."""
    moments = "Adam's moments start afresh" if fresh_moments(config, origin) else "Adam's moments are kept"
    return moments if origin.kind == "scratch" else f"{moments}; {of(origin, plan).text}"

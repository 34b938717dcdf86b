"""fastcpt: continual pre-training of GPT-NeoX / Pythia models.

Import the parts by name (`fastcpt.hf`, `fastcpt.shards`, `fastcpt.data`, `fastcpt.train`, `fastcpt.kernels.*`);
this module stays empty of heavy imports so that `fastcpt --help` starts without torch.
"""

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it in one line and exits with code 2.

    id: a short name of the cause, which docs/errors.md explains. The message names the file, the offset or step, the
    value, and the mend. A bug is an `assert` instead.
    """

    def __init__(self, id: str, message: str) -> None:
        super().__init__(id, message)  # both, so that a process can send the error to another
        self.id = id

    def __str__(self) -> str:
        return str(self.args[1])

    @property
    def line(self) -> str:
        """The message and the id as one line. What files and people put into names may not move the cursor."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{self} [{self.id}]")

"""fastcpt: continual pre-training of GPT-NeoX / Pythia models.

Import the parts by name (`fastcpt.hf`, `fastcpt.shards`, `fastcpt.data`, `fastcpt.train`, `fastcpt.kernels.*`);
this module stays empty of heavy imports so that `fastcpt --help` starts without torch.
"""

import os
import re

__version__ = "0.1.0"
PASSWORD = re.compile(r"(\w:/{0,2})[^/\s@]+@")  # in a URL, which as a path has lost a slash, or user:password@host
TOKEN = re.compile(r"\b(hf_|gh[pousr]_|sk-|AKIA)[\w-]{16,}")


def hidden(text: str) -> str:
    """A text without passwords in URLs, tokens of the usual forms, and what variables of secrets hold."""
    for name, value in os.environ.items():
        if re.search("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return TOKEN.sub("***", PASSWORD.sub(r"\1***@", text))


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
        """The message and the id as one line, no secret in it. What files put into names may not move the cursor."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in hidden(f"{self} [{self.id}]"))

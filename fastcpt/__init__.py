"""fastcpt: continual pre-training of GPT-NeoX / Pythia models.

Import the parts by name (`fastcpt.hf`, `fastcpt.shards`, `fastcpt.data`, `fastcpt.train`, `fastcpt.kernels.*`);
this module stays empty of heavy imports so that `fastcpt --help` starts without torch.
"""

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it in one line and exits with code 2.

    The message names the file, the offset or step, the value, and the mend. A bug is an `assert` instead.
    """

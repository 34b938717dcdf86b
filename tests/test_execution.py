"""What the settings of a run come to on a device, and what cannot run there."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcpt import UserError, parallel, train
from fastcpt.config import Count, Source, Train
from fastcpt.execution import Execution
from fastcpt.kernels import launch

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def choose(device: torch.device, **settings: Any) -> Execution:
    settings = {"tokens": Count(1), "batch_tokens": Count(1), "attention": "sdpa", **settings}
    return Execution.choose(Train(**settings), device, 64, 2048, False)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of type cuda that nothing is asked of but where it is."""
    monkeypatch.setattr(parallel, "has_bf16", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "on_triton", lambda x: True)
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: None)


def test_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for bf16 in (False, True):
        monkeypatch.setattr(parallel, "has_bf16", lambda device, bf16=bf16: bf16)
        chosen = choose(CPU)
        assert (chosen.kernels, chosen.loss_blocks) == (False, True)
        assert chosen.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert choose(CPU, precision="fp32").dtype == torch.float32
    assert not choose(CPU, loss="full").loss_blocks
    assert not choose(CPU, kernels="torch").kernels
    with pytest.raises(UserError, match="triton, which needs a GPU, and this is cpu; use auto"):
        choose(CPU, kernels="triton")


def test_on_a_gpu(fake_gpu: None) -> None:
    chosen = choose(GPU)
    assert (chosen.dtype, chosen.kernels, chosen.loss_blocks) == (torch.bfloat16, True, False)
    assert choose(GPU, loss="blocks").loss_blocks
    assert not choose(GPU, kernels="torch").kernels
    with pytest.raises(UserError, match="blocks, which needs Triton kernels on a GPU"):
        choose(GPU, kernels="torch", loss="blocks")


def test_the_choice_is_said_in_a_line(fake_gpu: None) -> None:
    assert str(choose(GPU)) == "Triton kernels, loss full, attention sdpa, as train.attention says"
    assert str(Execution(loss_blocks=True)) == "torch kernels, loss in blocks, attention not chosen"


@pytest.mark.parametrize("loss", ["full", "blocks"])
def test_a_run_on_kernels_is_the_run_on_torch(
    loss: str, tmp_path: Path, write_shards: Any, random_documents: Any, tiny_config: Callable[..., Any],
    triton_device: torch.device, launches: Counter[str],
) -> None:  # fmt: skip
    """Three steps through `train_step`: every kernel launched, AdamW's once a step, and weights equal to rounding."""
    write_shards(tmp_path / "new", random_documents(1, 35))
    results = []
    for kernels in ("torch", "triton"):
        launches.clear()
        data = {"train": [Source(name="new", path=str(tmp_path / "new"), weight=1.0)], "seq_len": 16}
        if kernels == "torch" and launch.INTERPRETED:
            launch.INTERPRETED = False  # the loss in blocks runs where its tensors are
        config = tiny_config(tmp_path / kernels, data=data, train={"kernels": kernels, "loss": loss, "compile": False,
            "tokens": Count(3 * 6 * 16), "batch_tokens": Count(6 * 16), "micro_batch": 4, "precision": "fp32"})  # fmt: skip
        state = train.setup(config)
        for step in range(3):
            train.train_step(state, state.mixture.windows(6 * step, 6))
        results.append([parameter.detach().clone() for parameter in state.model.parameters()])
        launch.INTERPRETED = triton_device.type == "cpu"
    assert launches["adamw_kernel"] == 3 and launches["qkv_rotary_backward_kernel"] == 3 * 2 * 2
    assert launches["_forward_kernel"] == 3 * 2 and launches["layer_norm_forward_kernel"] == 3 * 2 * 3
    # The whole, because Adam divides by the gradient's own size: where that is rounding alone (a bias that softmax
    # does not see), so is the step. All moved by 3 lr = 3e-3; a thousandth of that is far above rounding.
    torch_one, triton_one = (torch.cat([parameter.flatten() for parameter in result]) for result in results)
    assert (torch_one - triton_one).square().mean().sqrt() <= 3e-6

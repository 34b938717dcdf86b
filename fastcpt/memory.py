"""The memory of a training step, by part: formulas, checked against what autograd keeps."""

from fastcpt import metrics
from fastcpt.config import Config
from fastcpt.kernels.linear_cross_entropy import ROWS
from fastcpt.model import Architecture
from fastcpt.parallel import World


def saved_bytes(
    arch: Architecture, sequences: int, seq_len: int, bf16: bool, document_mask: bool, kernels: bool, loss_blocks: bool
) -> int:
    """Bytes that autograd keeps of an eager forward pass of `model.py`: those of the loss and the casts left out.

    A layer keeps, a token, with D the width, M the MLP's, H heads, T tokens a sequence, e bytes of the compute dtype:
      4 D x 2    inputs of both norms, fp32: copies in bf16; in fp32 the residual stream itself, once if parallel
      4 x 4      mean and deviation of both
      e D x 2    outputs of both norms, inputs of the next products
      3 e D      the packed product, for its v; + 2 e D for q and k if they are rotated, else they are views of it
      e D + 4 H  output of attention (the input of the next product) and its log-sum-exp
      2 e M      input and output of GELU
      e T        the document mask, made additive
    With kernels, norms keep the residual stream in the compute dtype and one mean and deviation of both norms if they
    have one input, q and k are rotated in place, and there is no document mask.
    Once: the last norm (4 D + 8 a token, with kernels e D + 8) and its output (e D, unless the loss is in blocks), ids
    (8) and, for torch's loss, targets (8); cosines and sines (T, R) fp32.
    """
    size, width, tokens = 2 if bf16 else 4, arch.width, sequences * seq_len
    inputs = 1 if arch.parallel_residual and (kernels or not bf16) else 2
    norm = size if kernels else 4
    products = 2 + 3 + (2 if arch.rotary_width and not kernels else 0) + 1
    layer = norm * width * inputs + (8 * inputs if kernels else 16)
    layer += size * width * products + 4 * arch.heads + 2 * size * arch.mlp_width
    layer += size * seq_len if document_mask and not kernels else 0
    last = norm * width + 8 + 8 + (0 if loss_blocks else size * width + (0 if kernels else 8))
    return tokens * (arch.layers * layer + last) + 2 * 4 * seq_len * arch.rotary_width


def parts(
    arch: Architecture, sequences: int, seq_len: int, bf16: bool, document_mask: bool,
    kernels: bool = False, loss_blocks: bool = False, moments: int = 4, shards: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Bytes of one process by part, at the moment of a step that needs most; their sum is the total.

    weights, gradients, moments: 4, 4 and 2 x `moments` bytes a parameter, shared out over `shards` processes. Under DDP
    gradients are views into its communication buckets, so those take no more.
    gathered: with shards, in the compute dtype the whole of both embeddings and two blocks, and of the larger of these
    groups the gradient in the compute dtype and, on its way to the shards, in fp32.
    casts: bf16 copies of the matrices but the input embedding, 2 bytes each, kept from forward to backward.
    activations: what autograd keeps for the backward pass of `sequences` x `seq_len` tokens (`saved_bytes`).
    logits: three fp32 tensors of (tokens, vocabulary), 12 V bytes a token: in the softmax's backward pass its output,
    the gradient that comes in and the one that goes out are alive at once. With kernels one, in the compute dtype. In
    blocks the gradients of the head's input and weight, twice, as each is multiplied by that of the loss, or once with
    a block of logits, whichever is more.

    For eager execution and a vocabulary many times the width: exact up to rounding, workspaces and the CUDA context. An
    upper estimate for a compiled model, which keeps less, and where a step is one micro-batch: then gradients and
    activations are not alive together. Evaluation keeps no activations; nothing is computed twice to save memory.
    """
    parameters, tokens, size = metrics.parameter_count(arch), sequences * seq_len, 2 if bf16 else 4
    head = arch.vocab_size * arch.width
    matrices = arch.layers * (4 * arch.width**2 + 2 * arch.width * arch.mlp_width) + (0 if loss_blocks else head)
    logits = (size if kernels else 12) * tokens * arch.vocab_size
    if loss_blocks:
        kept = size * tokens * arch.width + 4 * head
        rows = min(tokens, ROWS)
        logits = kept + max(kept, size * rows * arch.vocab_size + (2 * head if bf16 else 0))
    share = -(-parameters // shards)
    outer = 2 * head + 2 * arch.width
    block = (parameters - outer) // arch.layers
    gathered = size * (outer + 2 * block) + (size + 4) * max(outer, block)
    return {
        "weights": 4 * share,
        "gradients": 4 * share,
        "moments": 2 * moments * share,
        "gathered": gathered if shards > 1 else 0,
        "casts": 2 * matrices if bf16 and shards == 1 else 0,
        "activations": saved_bytes(arch, sequences, seq_len, bf16, document_mask, kernels, loss_blocks),
        "logits": logits,
    }


def of(config: Config, arch: Architecture, world: World, shards: int) -> dict[str, int]:
    """`parts` of a run on this kind of device: Triton kernels where there is a GPU, or where the configuration asks."""
    train, gpu = config.train, world.device.type == "cuda"
    share = -(-train.batch_tokens // config.data.seq_len // world.size)
    kernels = train.kernels == "triton" or (train.kernels == "auto" and gpu)
    blocks = train.loss == "blocks" or (train.loss == "auto" and not gpu and not kernels)
    return parts(
        arch, min(train.micro_batch, share), config.data.seq_len, train.precision == "bf16", config.data.document_mask,
        kernels, blocks, 2 if config.optim.moments == "bf16" else 4, shards,
    )  # fmt: skip

"""The memory of a training step, by part: formulas, checked against what autograd keeps."""

from collections.abc import Callable
from dataclasses import replace

from fastcpt import metrics
from fastcpt.config import Config
from fastcpt.cpu_attention import probabilities
from fastcpt.kernels.linear_cross_entropy import block_rows
from fastcpt.model import Architecture
from fastcpt.parallel import World


def block_bytes(
    arch: Architecture, seq_len: int, bf16: bool, document_mask: bool, kernels: bool, attention_blocks: bool = False
) -> float:
    """Bytes a token that autograd keeps of an eager forward pass of one block of `model.py`, without its casts.

    It keeps, a token, with D the width, M the MLP's, H heads, T tokens a sequence, e bytes of the compute dtype:
      4 D x 2    inputs of both norms, fp32: copies in bf16; in fp32 the residual stream itself, once if parallel
      4 x 4      mean and deviation of both
      e D x 2    outputs of both norms, inputs of the next products
      3 e D      the packed product, for its v; + 2 e D for q and k if they are rotated, else they are views of it
      e D + 4 H  output of attention (the input of the next product) and its log-sum-exp
      2 e M      input and output of GELU
      e T        the document mask, made additive
    With kernels, norms keep the residual stream in the compute dtype and one mean and deviation of both norms if they
    have one input, q and k are rotated in place, and there is no document mask.
    With attention in blocks (`cpu_attention.py`) q, k and v are kept apart, without the packed product, and of each head
    the probabilities, in place of its log-sum-exp and the mask.
    """
    size, width = 2 if bf16 else 4, arch.width
    inputs = 1 if arch.parallel_residual and (kernels or not bf16) else 2
    norm = size if kernels else 4
    products = 2 + 3 + (2 if arch.rotary_width and not kernels and not attention_blocks else 0) + 1
    layer = norm * width * inputs + (8 * inputs if kernels else 16)
    layer += size * width * products + 2 * size * arch.mlp_width
    if attention_blocks:
        return layer + size * arch.heads * probabilities(seq_len) / seq_len
    return layer + 4 * arch.heads + (size * seq_len if document_mask and not kernels else 0)


def saved_bytes(
    arch: Architecture, sequences: int, seq_len: int, bf16: bool, document_mask: bool, kernels: bool, loss_blocks: bool,
    attention_blocks: bool = False,
) -> int:  # fmt: skip
    """Bytes that autograd keeps of an eager forward pass of `model.py`: those of the loss and the casts left out.

    Of each block `block_bytes`. Once: `last_bytes` and ids (8) a token; cosines and sines (T, R) fp32.
    """
    layer = block_bytes(arch, seq_len, bf16, document_mask, kernels, attention_blocks)
    last = last_bytes(arch, bf16, kernels, loss_blocks)
    return round(sequences * seq_len * (arch.layers * layer + last + 8)) + 2 * 4 * seq_len * arch.rotary_width


def last_bytes(arch: Architecture, bf16: bool, kernels: bool, loss_blocks: bool) -> int:
    """Bytes a token kept after the blocks: the last norm (4 D + 8, with kernels e D + 8) and its output (e D, unless the
    loss is in blocks), and for torch's loss targets (8)."""
    size = 2 if bf16 else 4
    output = 0 if loss_blocks else size * arch.width + (0 if kernels else 8)
    return (size if kernels else 4) * arch.width + 8 + output


def recomputed_bytes(
    arch: Architecture, sequences: int, seq_len: int, bf16: bool, document_mask: bool, kernels: bool,
    attention_blocks: bool = False,
) -> int:  # fmt: skip
    """Bytes that the backward pass of one recomputed block takes beside what was kept of the forward pass.

    What it keeps (`block_bytes`), but for its input where that is what a norm keeps; the gradient that comes in (e D)
    and that of GELU's output (e M) a token; the gradient of the MLP's second matrix, which goes to fp32 when GELU's output
    has gone.
    """
    size, tokens, matrix = 2 if bf16 else 4, sequences * seq_len, arch.width * arch.mlp_width
    layer = block_bytes(arch, seq_len, bf16, document_mask, kernels, attention_blocks)
    layer += size * (arch.width + arch.mlp_width) - (size * arch.width if kernels or not bf16 else 0)
    return round(tokens * layer) + max(size * matrix, (6 if bf16 else 4) * matrix - size * tokens * arch.mlp_width)


def parts(
    arch: Architecture, sequences: int, seq_len: int, bf16: bool, document_mask: bool, kernels: bool = False,
    loss_blocks: bool = False, moments: int = 4, shards: int = 1, recompute: bool = False, ddp: bool = False,
    attention_blocks: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Bytes of one process by part, at the moment of a step that needs most; their sum is the total.

    weights, gradients, moments: 4, 4 and 2 x `moments` bytes a parameter, shared out over `shards` processes.
    buckets: of DDP, 4 bytes a parameter: gradients are summed over micro-batches beside them and then copied.
    gathered: with shards, in the compute dtype the whole of both embeddings and of two blocks; in a block's backward pass
    the head's gradient too, and the block's gradient in the compute dtype and, on its way to the shards, in fp32.
    casts: bf16 copies of the matrices but the input embedding, 2 bytes each, kept from forward to backward.
    activations: what autograd keeps for the backward pass of `sequences` x `seq_len` tokens (`saved_bytes`).
    logits: three fp32 tensors of (tokens, vocabulary), 12 V bytes a token: in the softmax's backward pass its output,
    the gradient that comes in and the one that goes out are alive at once. With kernels one, in the compute dtype. In
    blocks the gradients of the head's input and weight, twice, as each is multiplied by that of the loss, or once with
    a block of logits and, in bf16, the head's weight and on CPU a term of its gradient, whichever is more.
    recomputed: `recomputed_bytes`. Then activations are the inputs of the blocks, and casts those of one block or of the
    head.

    The moments are the end of the forward pass (logits), the backward pass of the last block and, with shards, the end of
    the backward pass, where the gradients of both embeddings go to their shards.

    For eager execution: exact up to rounding, workspaces and the CUDA context; with shards, communication frees its
    buffers a little earlier or later. An upper estimate for a compiled model, which keeps less, and where a step is one
    micro-batch: then gradients and activations are not alive together. Evaluation keeps no activations.
    """
    parameters, tokens, size = metrics.parameter_count(arch), sequences * seq_len, 2 if bf16 else 4
    head = arch.vocab_size * arch.width
    matrices = 4 * arch.width**2 + 2 * arch.width * arch.mlp_width  # of a block
    logits = (size if kernels else 12) * tokens * arch.vocab_size
    if loss_blocks:
        kept = size * tokens * arch.width + 4 * head
        rows = min(tokens, block_rows(arch.vocab_size, cpu=not kernels))
        logits = kept + max(kept, size * rows * arch.vocab_size + (2 if kernels else 4) * head * bf16)
    share = -(-parameters // shards)
    outer = 2 * head + 2 * arch.width
    block = (parameters - outer) // arch.layers
    last, loss_head = last_bytes(arch, bf16, kernels, loss_blocks), 0 if loss_blocks else head

    def moment(casts: int, activations: int, logits: int, recomputed: int, gathered: int) -> dict[str, int]:
        """casts: elements."""
        return {
            "gathered": gathered if shards > 1 else 0,
            "casts": 2 * casts if bf16 and shards == 1 else 0,
            "activations": activations,
            "logits": logits,
            "recomputed": recomputed,
        }

    whole = size * (outer + 2 * block)
    reduced = whole + size * head + (size + 4) * block
    end = moment(0, 0, 0, 0, size * outer + (size + 4) * outer)
    if recompute:
        inputs = tokens * (arch.layers * size * arch.width + 8) + 2 * 4 * seq_len * arch.rotary_width
        again = recomputed_bytes(arch, sequences, seq_len, bf16, document_mask, kernels, attention_blocks)
        loss = moment(loss_head, inputs + tokens * last, logits, 0, whole)
        backward = moment(matrices, inputs, 0, again, reduced)
    else:
        activations = saved_bytes(arch, sequences, seq_len, bf16, document_mask, kernels, loss_blocks, attention_blocks)
        loss = moment(arch.layers * matrices + loss_head, activations, logits, 0, whole)
        backward = moment(arch.layers * matrices, activations - tokens * last, 0, 0, reduced)
    return {
        "weights": 4 * share,
        "gradients": 4 * share,
        "moments": 2 * moments * share,
        "buckets": 4 * share if ddp else 0,
    } | max((loss, backward, end), key=lambda part: sum(part.values()))


def uses_kernels(config: Config, world: World) -> bool:
    """Triton kernels: where there is a GPU, or where the configuration asks."""
    return config.train.kernels == "triton" or (config.train.kernels == "auto" and world.device.type == "cuda")


def uses_blocks(config: Config, world: World) -> bool:
    gpu = world.device.type == "cuda" or uses_kernels(config, world)
    return config.train.loss == "blocks" or (config.train.loss == "auto" and not gpu)


def of(config: Config, arch: Architecture, world: World, shards: int, recompute: bool) -> dict[str, int]:
    """`parts` of a run on this kind of device."""
    train = config.train
    share = -(-train.batch_tokens // config.data.seq_len // world.size)
    average = {"average": 4 * -(-metrics.parameter_count(arch) // shards)} if train.ema else {}
    return average | parts(
        arch, min(train.micro_batch, share), config.data.seq_len, train.precision != "fp32", config.data.document_mask,
        uses_kernels(config, world), uses_blocks(config, world), 2 if config.optim.moments == "bf16" else 4, shards, recompute,
        ddp=shards == 1 and world.size > 1 and not train.deterministic,
        attention_blocks=world.device.type == "cpu" and train.precision != "fp32" and train.attention in ("auto", "blocks"),
    )  # fmt: skip


def notes(config: Config, world: World, shards: int, recompute: bool, sequences: int) -> dict[str, str]:
    """What each of `parts` is, for people, and what their total is of. sequences: of a micro-batch."""
    bf16, moments = config.train.precision != "fp32", config.optim.moments
    each = f"a parameter{f', in {shards} shards' if shards > 1 else ''}"
    logits = "softmax and its gradients, 3 x fp32 x vocabulary a token"
    if uses_kernels(config, world):
        logits = f"{'bf16' if bf16 else 'fp32'} x vocabulary a token"
    if uses_blocks(config, world):
        logits = "a block of them, and the gradients of the head"
    return {
        "weights": f"fp32, 4 bytes {each}",
        "gradients": f"fp32, 4 bytes {each}",
        "moments": f"{moments}, 2 x {2 if moments == 'bf16' else 4} bytes {each}",
        "average": f"of the weights, fp32, 4 bytes {each}",
        "buckets": "of DDP, in which gradients are averaged, fp32",
        "gathered": "two blocks, the embeddings and gradients on their way to shards",
        "casts": "bf16 copies of the matrices",
        "activations": f"{'inputs of blocks, ' if recompute else ''}kept for the backward pass of {sequences} x "
        f"{config.data.seq_len:,} tokens",
        "logits": logits,
        "recomputed": "one block, in its backward pass; logits are not alive then",
        "total": "in eager mode; compiled takes less",
    }


def needed(config: Config, arch: Architecture, world: World) -> Callable[[int, bool], int]:
    """needed(shards, recomputed) -> bytes in all, for `layout.choose`."""
    return lambda shards, recompute: sum(of(config, arch, world, shards, recompute).values())


def largest(
    config: Config, arch: Architecture, world: World, shards: int, recompute: bool, room: float, most: int
) -> int:
    """The largest micro-batch up to `most` sequences that takes no more than so many bytes, or 0."""

    def fits(sequences: int) -> bool:
        return sum(of(with_micro_batch(config, sequences), arch, world, shards, recompute).values()) <= room

    return next((sequences for sequences in range(most, 0, -1) if fits(sequences)), 0)


def with_micro_batch(config: Config, sequences: int) -> Config:
    return replace(config, train=replace(config.train, micro_batch=sequences))

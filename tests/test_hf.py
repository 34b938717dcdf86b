"""Hugging Face checkpoints: transformers writes what we read and reads what we write; everything else is refused."""

import json
import logging
import math
import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from fastcpt import UserError, hf, tensor_files
from fastcpt.model import Architecture, GPTNeoX

ARCH = Architecture(
    2, 48, 3, 257, 100, rotary_fraction=0.5, parallel_residual=False, rotary_base=500.0, norm_eps=1e-6, max_positions=64
)
LAYER = "gpt_neox.layers.1.attention"


def our_name(name: str) -> str:
    return name.removeprefix("gpt_neox.").replace("lm_head", "embed_out")  # transformers renamed it in memory


def their_model(dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    """transformers' model of ARCH with weights of which none is trivial."""
    config = GPTNeoXConfig(
        vocab_size=257,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=100,
        max_position_embeddings=64,
        layer_norm_eps=1e-6,
        use_parallel_residual=False,
        rotary_pct=0.5,
        rotary_emb_base=500.0,
    )
    model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def written_by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    their_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded_by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    their_model().save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def theirs(written_by_transformers: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(written_by_transformers, tmp_path / "theirs"))


@pytest.fixture
def sharded(sharded_by_transformers: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_by_transformers, tmp_path / "sharded"))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE within 257 ids whose normalizer is not GPT-NeoX's: a class that rebuilds one would show."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=240, special_tokens=["<pad>", "<|endoftext|>"], initial_alphabet=list("abcdefgĠ ,.0123456789")
    )
    tokenizer.train_from_iterator(["a bad cab, 2024 faced a bag. 1234 decade"] * 9, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def change_config(folder: Path, remove: tuple[str, ...] = (), **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in remove} | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of `model.safetensors`."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equals_transformers(ours: GPTNeoX, model: GPTNeoXForCausalLM) -> None:
    expected = {our_name(name): value for name, value in model.state_dict().items()}
    assert expected.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        assert torch.equal(value, expected[name].float()), name


# Reading


def test_reads_what_transformers_writes(written_by_transformers: Path) -> None:
    ours = hf.load_pretrained(str(written_by_transformers))
    assert ours.arch == ARCH
    reference = their_model()
    assert_equals_transformers(ours, reference)
    tokens = torch.randint(0, 257, (2, 37), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, actual = reference(tokens).logits, ours(tokens)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()  # DESIGN.md D8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_files_are_upcast_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = their_model(dtype)
    model.save_pretrained(tmp_path)
    assert_equals_transformers(hf.load_pretrained(tmp_path), model)


def test_reads_shards(sharded_by_transformers: Path) -> None:
    assert_equals_transformers(hf.load_pretrained(sharded_by_transformers), their_model())


def test_loads_in_place_into_a_model_without_memory_of_its_own(written_by_transformers: Path) -> None:
    with torch.device("meta"):
        model = GPTNeoX(hf.read_architecture(written_by_transformers))
    model.to_empty(device="cpu")
    before = [parameter.data_ptr() for parameter in model.parameters()]
    hf.load_weights_(model, written_by_transformers)
    assert before == [parameter.data_ptr() for parameter in model.parameters()]
    assert_equals_transformers(model, their_model())


def test_reads_the_old_spelling(theirs: Path) -> None:
    """The keys of the published Pythia files; what `transformers` makes of them is the reference."""
    old = {"rotary_pct": 1.0, "rotary_emb_base": 20000, "torch_dtype": "float16"}
    change_config(theirs, remove=("rope_parameters", "attention_bias", "dtype", "use_parallel_residual"), **old)
    reference = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    ours = hf.load_pretrained(theirs)
    assert (ours.arch.rotary_fraction, ours.arch.rotary_base, ours.arch.parallel_residual) == (1.0, 20000.0, True)
    tokens = torch.randint(0, 257, (2, 37), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, actual = reference(tokens).logits, ours(tokens)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_old_buffers_are_ignored(theirs: Path) -> None:
    buffers = {
        f"{LAYER}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        f"{LAYER}.masked_bias": torch.tensor(-1e9),
        f"{LAYER}.rotary_emb.inv_freq": torch.ones(4),
    }
    change_tensors(theirs, **buffers)
    assert_equals_transformers(hf.load_pretrained(theirs), their_model())


@pytest.mark.parametrize(
    ("hidden_act", "form"),
    [("gelu", "erf"), ("gelu_new", "tanh"), ("gelu_fast", "tanh"), ("gelu_pytorch_tanh", "tanh")],
)
def test_gelu_is_read_and_can_be_overridden(theirs: Path, hidden_act: str, form: str) -> None:
    change_config(theirs, hidden_act=hidden_act)
    assert hf.load_pretrained(theirs).arch.gelu == form
    assert hf.load_pretrained(theirs, gelu="tanh").arch.gelu == "tanh"
    assert hf.load_pretrained(theirs, gelu="erf").arch.gelu == "erf"


@pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_warned_of(theirs: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        hf.read_architecture(theirs)
        assert not caplog.records
        change_config(theirs, **{key: 0.1})
        hf.read_architecture(theirs)
    assert f"config.json: {key} is 0.1; training runs without dropout" in caplog.text


# Refusals: configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, 'model_type is "llama"; only GPT-NeoX'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true; only untied"),
        ({"attention_bias": False}, "attention_bias is false; only attention with biases"),
        ({"auto_map": {"AutoModel": "evil.py"}}, r"auto_map is .*evil.py.*; code that comes with a model is never run"),
        ({"hidden_act": "relu"}, 'hidden_act is "relu"; known are gelu'),
        ({"hidden_act": ["gelu"]}, r'hidden_act is \["gelu"\]; known are'),
        ({"hidden_size": "48"}, 'hidden_size is "48"; it must be a non-negative integer'),
        ({"hidden_size": 48.0}, "hidden_size is 48.0; it must be a non-negative integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"num_hidden_layers": 0}, "config.json: model.layers is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 10**400}, "vocab_size is 1000"),
        ({"num_attention_heads": 5}, "config.json: model.width 48 is not a multiple of model.heads 5"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps is NaN"),
        ({"use_parallel_residual": "yes"}, 'use_parallel_residual is "yes"; it must be true or false'),
        ({"rope_parameters": "default"}, 'rope_parameters is "default"; it must be an object'),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters.rope_type is "yarn"; only the default rotary'),
        ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor is 2.0; only the default rotary"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type is "linear"; only the default'),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rotary_pct is missing"),
        ({"rotary_pct": 0.25}, r"rotary_pct.*0.25.*rope_parameters.*0.5.*disagree; keep the one"),
        ({"rotary_emb_base": math.inf, "rope_parameters": None}, "rotary_emb_base is Infinity"),
    ],
)
def test_configurations_that_are_refused(theirs: Path, changes: dict, message: str) -> None:
    change_config(theirs, **changes)
    with pytest.raises(UserError, match=message) as raised:
        hf.load_pretrained(theirs)
    assert str(theirs / "config.json") in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size",
        "max_position_embeddings", "hidden_act", "layer_norm_eps",
    ],
)  # fmt: skip
def test_missing_keys_are_refused(theirs: Path, key: str) -> None:
    change_config(theirs, remove=(key,))
    with pytest.raises(UserError, match=f"config.json: {key} is missing; take the config.json"):
        hf.load_pretrained(theirs)


def test_configuration_that_is_missing_or_broken(theirs: Path) -> None:
    (theirs / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        hf.load_pretrained(theirs)
    (theirs / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: not found; it should be the configuration"):
        hf.load_pretrained(theirs)


# Refusals: tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_out.weight": None}, "theirs: embed_out.weight is missing, 1 in all"),
        ({"gpt_neox.layers.2.mlp.dense_4h_to_h.bias": torch.zeros(48)}, "layers.2.mlp.dense_4h_to_h.bias is unexpect"),
        (
            {f"{LAYER}.dense.bias": torch.zeros(49)},
            rf"{LAYER}.dense.bias has the shape \[49\], config.json says \[48\]",
        ),
        ({f"{LAYER}.dense.bias": torch.zeros(48, dtype=torch.int32)}, f"{LAYER}.dense.bias has the dtype I32; save"),
        ({f"{LAYER}.dense.bias": torch.zeros(48).double()}, f"{LAYER}.dense.bias has the dtype F64; save"),
        ({f"{LAYER}.dense.bias": torch.full((48,), math.nan)}, f"{LAYER}.dense.bias has 48 values that are NaN or inf"),
        ({f"{LAYER}.dense.bias": torch.eye(48)[0] / 0}, f"{LAYER}.dense.bias has 48 values that are NaN or infinite"),
    ],
)
def test_tensors_that_are_refused(theirs: Path, changes: dict, message: str) -> None:
    change_tensors(theirs, **changes)
    with pytest.raises(UserError, match=message) as raised:
        hf.load_pretrained(theirs)
    assert str(theirs) in str(raised.value) and "\n" not in str(raised.value)


def test_a_refused_header_leaves_the_model_as_it_was(theirs: Path) -> None:
    model = hf.load_pretrained(theirs)
    before = [parameter.clone() for parameter in model.parameters()]
    change_tensors(
        theirs, **{"gpt_neox.embed_in.weight": torch.zeros(257, 48), "embed_out.weight": torch.zeros(257, 47)}
    )
    with pytest.raises(UserError, match=r"embed_out.weight has the shape"):
        hf.load_weights_(model, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_truncated_files_are_refused(theirs: Path, keep: int) -> None:
    content = (theirs / "model.safetensors").read_bytes()
    (theirs / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file"):
        hf.load_pretrained(theirs)


@pytest.mark.parametrize(
    "garbage", [b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64, b"\x10" + b"\0" * 40]
)
def test_garbage_is_refused(theirs: Path, garbage: bytes) -> None:
    (theirs / "model.safetensors").write_bytes(garbage)
    with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file"):
        hf.load_pretrained(theirs)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "weights.pt"])
def test_pickles_are_refused_with_the_way_out(
    theirs: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (theirs / "model.safetensors").unlink()
    (theirs / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=f"{name}, a pickle.*from_pretrained.*safe_serialization=True"):
        hf.load_pretrained(theirs)
    assert not Path("it-ran").exists()
    (theirs / name).unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json; give the folder"):
        hf.load_pretrained(theirs)


# Refusals: the index, and paths


def change_index(folder: Path, name: str, file: object) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "../theirs/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "x\0.safetensors",
        "a.bin",
        7,
    ],
)
def test_index_must_hold_plain_file_names(sharded: Path, file: object) -> None:
    change_index(sharded, "embed_out.weight", file)
    with pytest.raises(UserError, match=r"index.json: embed_out.weight is in .*; it must be a plain file name"):
        hf.load_pretrained(sharded)


def test_index_must_agree_with_the_files(sharded: Path) -> None:
    original = (sharded / "model.safetensors.index.json").read_text()
    file = json.loads(original)["weight_map"]["gpt_neox.embed_in.weight"]
    change_index(sharded, f"{LAYER}.dense.bias", file)
    with pytest.raises(UserError, match=f"has {LAYER}.dense.bias, which the index puts in model-00001"):
        hf.load_pretrained(sharded)
    (sharded / "model.safetensors.index.json").write_text(original)
    change_index(sharded, "one.more", file)
    with pytest.raises(UserError, match=rf"{file}: one.more is missing; download the file again"):
        hf.load_pretrained(sharded)
    change_index(sharded, "one.more", "model-99999.safetensors")
    with pytest.raises(UserError, match=r"model-99999.safetensors: not a whole safetensors file \(No such file"):
        hf.load_pretrained(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map is null"):
        hf.load_pretrained(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(theirs: Path, tmp_path: Path, name: str) -> None:
    (theirs / name).rename(tmp_path / "secret")
    (theirs / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name}: a link to .*secret, outside of its folder"):
        hf.load_pretrained(theirs)


def test_links_out_of_the_folder_in_shards_are_refused(sharded: Path, tmp_path: Path) -> None:
    file = next(sharded.glob("model-00002*"))
    file.rename(tmp_path / "secret")
    file.symlink_to("../secret")
    with pytest.raises(UserError, match=r"a link to .*secret, outside of its folder"):
        hf.load_pretrained(sharded)


def test_the_layout_of_the_hubs_cache_is_read(theirs: Path, tmp_path: Path) -> None:
    """Snapshots hold links to blobs, those of newer clients to blobs that all models share."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abcd"
    blobs, shared = snapshot.parents[1] / "blobs", tmp_path / "hub" / "blobs"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    (theirs / "config.json").rename(blobs / "1")
    (theirs / "model.safetensors").rename(shared / "2")
    (blobs / "2").symlink_to("../../blobs/2")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    assert_equals_transformers(hf.load_pretrained(snapshot), their_model())
    (snapshot / "config.json").unlink()
    shutil.copy(blobs / "1", tmp_path / "secret")
    (snapshot / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside of its folder"):
        hf.load_pretrained(snapshot)


# The hub, whose own client is the boundary: no test has a network.


@pytest.mark.parametrize(
    ("source", "hub_id", "revision"),
    [("EleutherAI/pythia-14m@step3000", "EleutherAI/pythia-14m", "step3000"), ("gpt-neox", "gpt-neox", None)],
)
def test_hub_ids_go_to_the_client(
    written_by_transformers: Path, monkeypatch: pytest.MonkeyPatch, source: str, hub_id: str, revision: str | None
) -> None:
    client = mock.Mock(return_value=str(written_by_transformers))
    monkeypatch.setattr("huggingface_hub.snapshot_download", client)
    assert hf.load_pretrained(source).arch == ARCH
    client.assert_called_once_with(hub_id, revision=revision, allow_patterns=["*.safetensors", "*.json"])


def hub_error(name: str) -> Exception:
    """The hub's errors want the answer of a server to be made; the class is all that matters here."""
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error("RevisionNotFoundError"), "org/name has no revision 'v2'; its page on the hub lists them"),
        (hub_error("RepositoryNotFoundError"), "no such folder, and no such model on the hub"),
        (hub_error("GatedRepoError"), "log in to see a private one"),
        (hub_error("LocalEntryNotFoundError"), "the hub did not deliver it .*; mend the name or the network"),
        (ConnectionError("no route\nto host"), r"did not deliver it \(ConnectionError: no route\); mend the name"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_the_hubs_errors_are_the_users(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=rf"org/name@v2: .*{message}") as raised:
        hf.resolve("org/name@v2")
    assert "\n" not in str(raised.value)


def test_the_hubs_client_is_not_asked_for_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = mock.Mock()
    monkeypatch.setattr("huggingface_hub.snapshot_download", client)
    file = tmp_path / "model.safetensors"
    file.touch()
    for source in ("runs/a/checkpoints", "/nowhere/at/all", str(file)):
        with pytest.raises(UserError, match=r"not a folder, and not a hub-id\[@revision\]"):
            hf.resolve(source)
    client.assert_not_called()
    assert hf.resolve(str(tmp_path)) == tmp_path


# Writing


def test_transformers_reads_what_we_write(written_by_transformers: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    ours = hf.load_pretrained(written_by_transformers, gelu="tanh")
    hf.save_pretrained(ours, tmp_path / "deep" / "out", tokenizer_file)
    reference, info = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reference.dtype == torch.float32
    assert_equals_transformers(ours, reference)
    tokens = torch.randint(0, 257, (2, 37), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, actual = reference(tokens).logits, ours(tokens)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()  # with erf it is 1e-3: tanh was written
    assert reference.generation_config.eos_token_id == 1


def test_the_tokenizer_survives(written_by_transformers: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    hf.save_pretrained(hf.load_pretrained(written_by_transformers), tmp_path / "out", tokenizer_file)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "A bad  CAB , 2024<|endoftext|>faced 77 . bags"
    ids = Tokenizer.from_file(str(tokenizer_file)).encode(text).ids
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == Tokenizer.from_file(str(tokenizer_file)).decode(ids, skip_special_tokens=False)
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.unk_token_id) == (1, 1, 1)
    assert loaded.model_max_length == 64


@pytest.mark.parametrize("limit", [hf.MAX_SHARD_BYTES, 50_000])
def test_files_hold_the_same_tensors_after_import_and_export(
    written_by_transformers: Path, tmp_path: Path, limit: int
) -> None:
    ours = hf.load_pretrained(written_by_transformers)
    hf.save_pretrained(ours, tmp_path / "out", max_shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 2) == (limit == 50_000) and (tmp_path / "out" / tensor_files.INDEX).exists() == (
        len(files) > 1
    )
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1, "one file is less readable"
    exported: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert file.stat().st_size < limit + 8_192 or len(load_file(file)) == 1  # a header of names, shapes and offsets
        exported |= load_file(file)
    original = load_file(written_by_transformers / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(
        exported[name].dtype == torch.float32 and torch.equal(exported[name], original[name]) for name in original
    )
    again = hf.load_pretrained(tmp_path / "out")
    assert again.arch == ours.arch
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_configuration_has_both_spellings(gelu: str, tmp_path: Path) -> None:
    arch = Architecture(1, 12, 3, 17, 5, 0.5, gelu, False, 123.5, 1e-7, 99)
    (tmp_path / "config.json").write_text(json.dumps(hf.config_json(arch, eod_id=None)))
    assert hf.read_architecture(tmp_path) == arch
    for removed in (("rope_parameters",), ("rotary_pct", "rotary_emb_base")):
        (tmp_path / "config.json").write_text(json.dumps(hf.config_json(arch, eod_id=None)))
        change_config(tmp_path, remove=removed)
        assert hf.read_architecture(tmp_path) == arch
        theirs = GPTNeoXConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 123.5, "partial_rotary_factor": 0.5}


def test_existing_output_is_refused_and_an_empty_folder_is_not(tmp_path: Path) -> None:
    model = GPTNeoX(Architecture(1, 8, 1, 17))
    model.initialise_()
    (tmp_path / "out").mkdir()
    hf.save_pretrained(model, tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for path in (tmp_path / "out", tmp_path / "out" / "config.json"):
        with pytest.raises(UserError, match="exists; name a new folder"):
            hf.save_pretrained(model, path)
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("failing", ["tensor_files.write", "hf.sync_file"])
def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    model = GPTNeoX(Architecture(1, 8, 1, 17))
    monkeypatch.setattr(f"fastcpt.{failing}", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        hf.save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_are_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    model = GPTNeoX(Architecture(1, 8, 1, 257))
    with pytest.raises(UserError, match="has no token '</s>'; name its end-of-document token"):
        hf.save_pretrained(model, tmp_path / "out", tokenizer_file, eod="</s>")
    with pytest.raises(UserError, match=r"has the id .*, the model 17 rows; give the model's tokenizer"):
        hf.save_pretrained(GPTNeoX(Architecture(1, 8, 1, 17)), tmp_path / "out", tokenizer_file)
    (tmp_path / "broken.json").write_text("{}")
    for file in ("broken.json", "missing.json"):
        with pytest.raises(UserError, match=f"{file}: not a tokenizer.json"):
            hf.save_pretrained(model, tmp_path / "out", tmp_path / file)
    assert not (tmp_path / "out").exists()

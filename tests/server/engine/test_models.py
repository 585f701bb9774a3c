"""Loading: what is refused at start, and with which words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from macaw_kernels import ALWAYS_SHARE
from macaw_kernels.cpu.decoder import DecoderWeights
from macaw_server.config import EngineConfig
from macaw_server.engine import attention
from macaw_server.engine.core import EngineCore
from macaw_server.engine.memory import choose_device, choose_dtype
from macaw_server.errors import ConfigError, MemoryBudgetError, ModelLoadError
from macaw_server.models import loader, native, probe
from tiny_models import make_model, save_model, tokenizer


def load(folder: Path | str, **config: Any) -> EngineCore:
    return EngineCore(EngineConfig(model=str(folder), dtype="float32", **config))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model(tmp_path / "llama", "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("falcon", {"alibi": False}, "layers go through the replaceable attention"),
        ("falcon", {"alibi": True}, "layers go through the replaceable attention"),
        ("bloom", {}, "layers go through the replaceable attention"),
        ("llama4_text", {"attention_chunk_size": 32}, "chunked_attention"),
        ("doge", {}, "builds a mask of its own|logits are off|not supported"),
        ("mamba", {}, "0 of its 4 layers|layers of kind"),
    ],
)
def test_models_that_would_answer_wrongly_are_refused(
    model_type: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    shape = {
        "vocab_size": 600,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type in ("llama4_text", "doge"):
        shape |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
    if model_type == "llama4_text":
        shape |= {"intermediate_size_mlp": 96, "num_local_experts": 2}
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**shape, **overrides))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=reason) as refusal:
        load(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "Macaw" in str(refusal.value) or "Supported are" in str(refusal.value)


def test_a_model_whose_paged_logits_differ_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **kw: real(*args, **{**kw, "scale": 0.2}))
    with pytest.raises(ModelLoadError, match=r"logits are off by .* standard deviations"):
        load(llama)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "olmoe"])
def test_a_router_that_rounding_flips_is_no_reason_to_refuse(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    save_model(tmp_path, model_type)
    config = EngineConfig(model=str(tmp_path), dtype="bfloat16")
    assert EngineCore(config).info.dtype == "bfloat16"
    assert "accepted layer by layer" in caplog.text, "its logits are within rounding: this tests nothing"

    real = attention.attend

    def last_row_off(*args: Any, **options: Any) -> torch.Tensor:
        out = real(*args, **options)
        out[-1] += out.std()
        return out

    for broken in (
        lambda *args, **options: real(*args, **{**options, "scale": 1.2 * options["scale"]}),
        lambda *args, **options: real(*args, **{**options, "window": 5}),
        last_row_off,
    ):
        monkeypatch.setattr(attention, "attend", broken)
        with pytest.raises(ModelLoadError, match="one of its attention layers is off by"):
            EngineCore(config)


def test_wrong_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the attention may differ where a router flips, not everywhere."""
    save_model(tmp_path, "mixtral")
    real = probe._check_layers

    def spoilt(model: Any, *args: Any) -> None:
        paged = model.set_attn_implementation

        def switch(name: str) -> None:
            paged(name)
            if name == attention.ATTENTION_NAME:
                model.model.layers[2].mlp.forward = torch.zeros_like

        monkeypatch.setattr(model, "set_attn_implementation", switch)
        real(model, *args)

    monkeypatch.setattr(probe, "_check_layers", spoilt)
    with pytest.raises(ModelLoadError, match="one of its decoder layers is off by"):
        EngineCore(EngineConfig(model=str(tmp_path), dtype="bfloat16"))


def test_a_model_without_a_router_has_no_second_chance(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_error", lambda *_: 0.2)
    with pytest.raises(ModelLoadError, match="its logits are off by"):
        EngineCore(EngineConfig(model=str(llama), dtype="bfloat16"))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelLoadError, match="'t5', which transformers does not run as a causal language model"):
        load(tmp_path, load_format="dummy")


def test_missing_folder_file_and_parts(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"No folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="is a file"):
        load(llama / "config.json")
    (llama / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(ModelLoadError, match=r"no weights.*--load-format dummy"):
        load(llama)
    assert load(llama, load_format="dummy").info.max_model_len == 512
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load(llama)


def test_a_missing_shard_and_missing_tensors_are_named(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "m", max_shard_size="300KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ModelLoadError, match=f"1 are missing: {shards[-1].name}"):
        load(tmp_path / "m")

    save_model(tmp_path / "short", "llama", num_hidden_layers=2)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        ModelLoadError, match=r"9 weights of LlamaForCausalLM are not in its files, such as model\.layers\.2"
    ):
        load(tmp_path / "short")


def test_a_damaged_weight_file_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelLoadError, match="Cannot load"):
        load(llama)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        loader.load_tokenizer(EngineConfig(model=str(tmp_path)))


def test_context_over_the_models_is_refused_and_dynamic_rope_is_bounded(llama: Path, tmp_path: Path) -> None:
    assert load(llama, max_model_len=300).info.max_model_len == 300
    with pytest.raises(ConfigError, match="--max-model-len 513 is over the 512"):
        load(llama, max_model_len=513)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    save_model(tmp_path / "dynamic", "llama", rope_parameters=rope)
    assert load(tmp_path / "dynamic").info.max_model_len == 128


def test_memory_for_the_pool(llama: Path) -> None:
    page_bytes = load(llama).info.page_bytes
    core = load(llama, kv_memory=page_bytes * 20)
    assert (core.info.num_pages, core.info.max_model_len) == (20, 320), "lowered to what the pool holds"
    assert load(llama, kv_memory=page_bytes * 40).info.max_model_len == 512
    with pytest.raises(MemoryBudgetError, match=r"hold 320 tokens, fewer than the context of 400.*--max-model-len"):
        load(llama, kv_memory=page_bytes * 20, max_model_len=400)
    with pytest.raises(MemoryBudgetError, match="hold 16 tokens"):
        load(llama, kv_memory=page_bytes)
    with pytest.raises(MemoryBudgetError, match="are free on cpu"):
        load(llama, kv_memory=2**50)


def test_devices_and_dtypes() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("bfloat16", torch.device("cpu"), native=False) == torch.bfloat16
    assert choose_dtype("float32", torch.device("cpu"), native=True) == torch.float32
    assert choose_dtype("auto", torch.device("cpu"), native=True) == torch.bfloat16
    for name in ("gpu", "meta"):
        with pytest.raises(ConfigError, match="Accepted: auto, cpu, cuda"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees 0 GPUs"):
            choose_device("cuda:1")


def test_bfloat16_passes_the_probe(llama: Path) -> None:
    assert EngineCore(EngineConfig(model=str(llama), dtype="bfloat16")).info.dtype == "bfloat16"


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_native_decoder_is_checked_against_the_model(
    dtype: str, quantization: str | None, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    core = EngineCore(EngineConfig(model=str(llama), dtype=dtype, quantization=quantization))
    assert core.info.backend == "native"
    assert f"native CPU decoder with {quantization or dtype} weights" in caplog.text
    if quantization:
        assert core.info.weight_bytes < EngineCore(EngineConfig(model=str(llama), dtype=dtype)).info.weight_bytes


def test_native_bfloat16_is_as_exact_as_the_stock_model() -> None:
    """Against float32 with the same weights; what it rounds to bfloat16, if anything, the stock modules round too."""
    model = make_model("llama", head_dim=64).bfloat16()
    exact = copy.deepcopy(model).float()
    prompts = probe._prompts(600)
    with torch.inference_mode():
        truth = [probe._stock_logits(exact, prompt) for prompt in prompts]
        stock = [probe._stock_logits(model, prompt) for prompt in prompts]
        ready = probe.prepare(
            model, EngineConfig(model="llama", dtype="bfloat16"), lambda heads: ALWAYS_SHARE, lambda: 512
        )
        assert ready.backend == "native"
        native_logits = probe._paged_logits(model, ready.forward, ready.layers, prompts, lambda heads: ALWAYS_SHARE)
    assert probe._error(native_logits, truth) < probe._error(stock, truth)


def test_a_context_shorter_than_the_probe_is_served_natively(llama: Path) -> None:
    core = load(llama, max_model_len=8)
    assert (core.info.backend, core.info.max_model_len) == ("native", 8)


def test_a_native_decoder_that_answers_otherwise_is_not_used(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def misread(*args: Any) -> DecoderWeights:
        weights = native.read_weights(*args)
        weights.eps = 1.0
        return weights

    monkeypatch.setattr(probe, "read_weights", misread)
    assert load(llama).info.backend == "transformers"
    assert "its logits are off by" in caplog.text
    with pytest.raises(ConfigError, match="--quantization int8 needs the native CPU decoder"):
        load(llama, quantization="int8")


def test_quantization_of_a_model_without_a_native_decoder_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "mixtral", "mixtral")
    with pytest.raises(ConfigError, match=r"models of type mixtral have no native decoder.*Serve without"):
        load(tmp_path / "mixtral", quantization="int8")
    save_model(tmp_path / "llama", "llama")
    with pytest.raises(ConfigError, match="native kernels are switched off"):
        load(tmp_path / "llama", quantization="int8", native=False)

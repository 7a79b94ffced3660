"""Models as transformers and timm publish them, from configurations with random weights: nobody's code but their own.

They need those two packages (`pip install transformers timm`), which nothing else here does. Widths are those of the
model that each docstring names, with fewer layers; keyword inputs and the results' own classes stay as they are.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from sizes import Draw, default_device, ids, sized, values
from torch import Tensor, nn

from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.errors import MissingError
from agnitra_lab.workloads.assembly import assemble, seeded

BF16 = torch.bfloat16
Build = Callable[[], nn.Module]


def published(
    name: str,
    build: Build,
    draws: Mapping[str, Draw],
    *,
    dtype: torch.dtype = BF16,
    num_layers: int = 2,
    items: int = 1,
    unit: Literal["tokens", "images", "samples", "calls"] = "calls",
    phase: Literal["prefill", "decode"] | None = None,
    add: Callable[[nn.Module, dict[str, Any]], None] | None = None,
) -> Workload:
    """Make a workload whose inputs all go by keyword; `add` puts what only the model itself can make among them."""
    device = default_device()
    kept = torch.float32 if device == "cpu" else dtype
    model = seeded(build, device, kept, num_residual_layers=num_layers)

    def make_inputs(seed: int) -> Inputs:
        made: dict[str, Any] = {
            key: draw(seed + index, device, kept) for index, (key, draw) in enumerate(draws.items())
        }
        if add is not None:
            add(model, made)
        return (), made

    settings = {"scale": sized("full", "tiny"), "dtype": str(kept).removeprefix("torch.")}
    return assemble(name, model, make_inputs, settings, items=items, unit=unit, phase=phase)


def package(name: str) -> Any:
    """Import a package that nothing else here needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(
            f"{name} is needed for this model, and cannot be imported: {error}.", hint=f"Install it: pip install {name}"
        ) from error


def of_transformers(model: str, config: str, attention: str = "sdpa", **fields: Any) -> Build:
    """Return what builds a class of transformers from a configuration."""

    def build() -> nn.Module:
        transformers = package("transformers")
        filled = getattr(transformers, config)(**fields)
        filled._attn_implementation = attention
        built: nn.Module = getattr(transformers, model)(filled)
        return built

    return build


def of_timm(name: str) -> Build:
    """Return what builds a model of timm by its name."""

    def build() -> nn.Module:
        built: nn.Module = package("timm").create_model(name, pretrained=False)
        return built

    return build


def left_padded(batch: int, sequence: int) -> Draw:
    """1 for a token, 0 for what is before the first one: every row has another length."""

    def draw(seed: int, device: str, dtype: torch.dtype) -> Tensor:
        lengths = torch.tensor([sequence - (seed + 3 * row) % (sequence // 2) for row in range(batch)], device=device)
        return (torch.arange(sequence, device=device)[None, :] >= sequence - lengths[:, None]).long()

    return draw


def right_padded(batch: int, sequence: int) -> Draw:
    """1 for a token, 0 for what is after the last one."""
    draw = left_padded(batch, sequence)
    return lambda seed, device, dtype: draw(seed, device, dtype).flip(-1)


# --- Decoders over a prompt; each returns its filled cache ------------------------------------------------------------

DECODER = sized(
    {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
     "num_hidden_layers": 4, "vocab_size": 32768, "max_position_embeddings": 4096},
    {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
     "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 256},
)  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
B, S = sized((2, 1024), (2, 32))
PROMPT = {"input_ids": ids(B, S, below=DECODER["vocab_size"])}


def decoder(
    name: str, family: str, draws: Mapping[str, Draw] = PROMPT, attention: str = "sdpa", **fields: Any
) -> Workload:
    """A causal language model over a prompt."""
    build = of_transformers(f"{family}ForCausalLM", f"{family}Config", attention, **DECODER, **TOKENS, **fields)
    return published(
        name, build, draws, num_layers=2 * DECODER["num_hidden_layers"], items=B * S, unit="tokens", phase="prefill"
    )


def hf_llama() -> Workload:
    """Llama 3.2 1B's widths."""
    return decoder("hf_llama", "Llama", rope_theta=500000.0)


def hf_llama_padded() -> Workload:
    """The same with prompts of different lengths."""
    return decoder("hf_llama_padded", "Llama", PROMPT | {"attention_mask": left_padded(B, S)})


def hf_mistral() -> Workload:
    """A window shorter than the prompt."""
    return decoder("hf_mistral", "Mistral", sliding_window=sized(256, 16))


def hf_qwen3() -> Workload:
    """Norms of queries and keys."""
    return decoder("hf_qwen3", "Qwen3", head_dim=sized(128, 16))


def hf_gemma2() -> Workload:
    """Capped scores, written out."""
    fields = {"head_dim": sized(256, 16), "sliding_window": sized(256, 16)}
    return decoder("hf_gemma2", "Gemma2", attention="eager", **fields)


def hf_gemma3() -> Workload:
    """Layers with a window and one without."""
    kinds = ["sliding_attention"] * (DECODER["num_hidden_layers"] - 1) + ["full_attention"]
    fields = {"head_dim": sized(256, 16), "sliding_window": sized(256, 16), "layer_types": kinds}
    build = of_transformers("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, **TOKENS, **fields)
    return published("hf_gemma3", build, PROMPT, num_layers=8, items=B * S, unit="tokens", phase="prefill")


def hf_phi3() -> Workload:
    """q, k, v and gate, up in one weight each."""
    return decoder("hf_phi3", "Phi3")


def hf_olmo2() -> Workload:
    """Norms after each branch."""
    return decoder("hf_olmo2", "Olmo2")


def hf_stablelm() -> Workload:
    """LayerNorms and rotations of a part of each head."""
    return decoder("hf_stablelm", "StableLm")


def hf_gpt_neox() -> Workload:
    """Attention and MLP side by side, attention written out."""
    fields = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    build = of_transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", "eager", **fields, **TOKENS)
    return published("hf_gpt_neox", build, PROMPT, num_layers=8, items=B * S, unit="tokens", phase="prefill")


def hf_gpt2() -> Workload:
    """GPT-2 medium's widths, its odd vocabulary."""
    sizes = sized(
        {"n_embd": 1024, "n_head": 16, "n_layer": 6, "vocab_size": 50257},
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 517},
    )
    build = of_transformers("GPT2LMHeadModel", "GPT2Config", n_positions=1024, **sizes)
    draws = {"input_ids": ids(B, S, below=sizes["vocab_size"])}
    return published("hf_gpt2", build, draws, num_layers=12, items=B * S, unit="tokens", phase="prefill")


def hf_opt() -> Workload:
    """Learned positions, ReLU."""
    sizes = sized({"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 4, "num_attention_heads": 32},
                  {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4})  # fmt: skip
    build = of_transformers(
        "OPTForCausalLM", "OPTConfig", **sizes, word_embed_proj_dim=sizes["hidden_size"],
        vocab_size=DECODER["vocab_size"], max_position_embeddings=2048,
    )  # fmt: skip
    return published("hf_opt", build, PROMPT, num_layers=8, items=B * S, unit="tokens", phase="prefill")


# --- One token with a cache -------------------------------------------------------------------------------------------


def hf_llama_decode() -> Workload:
    """Llama 3.2 1B's widths, one token with a static cache that is given and written in place."""

    def add(model: nn.Module, made: dict[str, Any]) -> None:
        from transformers import StaticCache

        cache = StaticCache(config=model.config, max_cache_len=sized(1024, 32))
        heads, size = DECODER["num_key_value_heads"], DECODER["hidden_size"] // DECODER["num_attention_heads"]
        cache.early_initialization(1, heads, size, next(model.parameters()).dtype, made["input_ids"].device)
        generator = torch.Generator(made["input_ids"].device).manual_seed(int(made["input_ids"]))
        for layer in cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
            layer.cumulative_length.fill_(sized(700, 20))
        made["past_key_values"] = cache

    build = of_transformers(
        "LlamaForCausalLM", "LlamaConfig", **{**DECODER, "num_hidden_layers": sized(8, 2)}, **TOKENS
    )
    draws = {"input_ids": ids(1, 1, below=DECODER["vocab_size"])}
    return published("hf_llama_decode", build, draws, num_layers=16, unit="tokens", phase="decode", add=add)


def hf_qwen2_decode_dynamic() -> Workload:
    """One token with a cache that grows."""

    def add(model: nn.Module, made: dict[str, Any]) -> None:
        from transformers import DynamicCache

        heads, size = DECODER["num_key_value_heads"], DECODER["hidden_size"] // DECODER["num_attention_heads"]
        device, dtype = made["input_ids"].device, next(model.parameters()).dtype
        generator = torch.Generator(device).manual_seed(int(made["input_ids"][0, 0]))
        cache = DynamicCache(config=model.config)
        shape = (made["input_ids"].shape[0], heads, sized(700, 20), size)
        for layer in range(model.config.num_hidden_layers):
            key, value = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
            cache.update(key, value, layer)
        made["past_key_values"] = cache

    build = of_transformers(
        "Qwen2ForCausalLM", "Qwen2Config", **{**DECODER, "num_hidden_layers": sized(8, 2)}, **TOKENS
    )
    draws = {"input_ids": ids(4, 1, below=DECODER["vocab_size"])}
    return published("hf_qwen2_decode_dynamic", build, draws, num_layers=16, unit="tokens", phase="decode", add=add)


# --- Encoders ---------------------------------------------------------------------------------------------------------

ENCODER = sized(
    {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 6},
    {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2},
)
B_TEXT, S_TEXT = sized((32, 256), (2, 32))


def encoder(name: str, model: str, config: str, **fields: Any) -> Workload:
    """A text encoder over padded texts."""
    vocabulary = sized(30522, 512)
    sizes = {**ENCODER, "vocab_size": vocabulary, "max_position_embeddings": sized(514, 66), **fields}
    draws = {"input_ids": ids(B_TEXT, S_TEXT, below=vocabulary), "attention_mask": right_padded(B_TEXT, S_TEXT)}
    build = of_transformers(model, config, **sizes)
    return published(name, build, draws, num_layers=12, items=B_TEXT * S_TEXT, unit="tokens")


def hf_bert_classifier() -> Workload:
    """BERT base's widths, two classes."""
    return encoder("hf_bert_classifier", "BertForSequenceClassification", "BertConfig")


def hf_roberta_masked() -> Workload:
    """Words in place of masks: the odd vocabulary over all positions."""
    return encoder("hf_roberta_masked", "RobertaForMaskedLM", "RobertaConfig", vocab_size=sized(50265, 517))


def hf_modernbert() -> Workload:
    """Windows of 128 in two of three layers, GeGLU."""
    return encoder(
        "hf_modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )


def hf_t5() -> Workload:
    """T5 base's widths: an encoder and a decoder."""
    fields = sized(
        {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 12},
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    )
    vocabulary = sized(32128, 512)
    fields |= {"vocab_size": vocabulary, "decoder_start_token_id": 0}
    build = of_transformers("T5ForConditionalGeneration", "T5Config", "eager", **fields)
    draws = {
        "input_ids": ids(*sized((16, 512), (2, 32)), below=vocabulary),
        "decoder_input_ids": ids(*sized((16, 128), (2, 16)), below=vocabulary),
    }
    workload = published("hf_t5", build, draws, num_layers=20, unit="samples", items=sized(16, 2))
    # T5 does not scale its scores, its weights do. With those of others it is in chaos: its bf16 is 59% off its fp64.
    with torch.no_grad():
        for name, parameter in workload.model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(fields["d_kv"] ** -0.5)
    return workload


def hf_whisper() -> Workload:
    """Whisper small's widths over 30 s of sound and some words."""
    sizes = sized({"d_model": 768, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
                   "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_layers": 4, "decoder_layers": 4,
                   "max_source_positions": 1500, "vocab_size": 51865},
                  {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
                   "decoder_ffn_dim": 96, "encoder_layers": 2, "decoder_layers": 2, "max_source_positions": 50,
                   "vocab_size": 517})  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    build = of_transformers("WhisperForConditionalGeneration", "WhisperConfig", **sizes, **tokens, num_mel_bins=80)
    draws = {"input_features": values(*sized((8, 80, 3000), (2, 80, 100))),
             "decoder_input_ids": ids(*sized((8, 64), (2, 16)), below=sizes["vocab_size"])}  # fmt: skip
    return published("hf_whisper", build, draws, num_layers=16, unit="samples", items=sized(8, 2))


def hf_wav2vec2() -> Workload:
    """Wav2vec 2.0 base's widths over 10 s of sound."""
    sizes = {
        **ENCODER,
        **sized(
            {},
            {
                "conv_dim": [32] * 3,
                "conv_stride": [5, 4, 4],
                "conv_kernel": [10, 3, 3],
                "num_feat_extract_layers": 3,
                "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 4,
            },
        ),
    }
    build = of_transformers("Wav2Vec2ForCTC", "Wav2Vec2Config", **sizes)
    return published(
        "hf_wav2vec2",
        build,
        {"input_values": values(*sized((8, 160000), (2, 4000)))},
        num_layers=12,
        unit="samples",
        items=sized(8, 2),
    )


# --- Images -----------------------------------------------------------------------------------------------------------

B_IMAGE, SIDE = sized((32, 224), (2, 64))
IMAGES = {"pixel_values": values(B_IMAGE, 3, SIDE, SIDE)}


def image_model(name: str, model: str, config: str, **fields: Any) -> Workload:
    """A vision transformer of patches of 16 (8 on a CPU)."""
    sizes = {**ENCODER, "image_size": SIDE, "patch_size": sized(16, 8), **fields}
    return published(name, of_transformers(model, config, **sizes), IMAGES, num_layers=12, items=B_IMAGE, unit="images")


def hf_vit() -> Workload:
    """ViT base's widths."""
    return image_model("hf_vit", "ViTForImageClassification", "ViTConfig")


def hf_siglip() -> Workload:
    """SigLIP's image half: no class token, a pooling attention at the end."""
    return image_model("hf_siglip", "SiglipVisionModel", "SiglipVisionConfig")


def hf_clip_vision() -> Workload:
    """CLIP's image half."""
    return image_model("hf_clip_vision", "CLIPVisionModel", "CLIPVisionConfig")


def hf_dinov2() -> Workload:
    """Scaled residual branches."""
    return image_model("hf_dinov2", "Dinov2Model", "Dinov2Config", patch_size=sized(14, 8))


def hf_segformer() -> Workload:
    """SegFormer B1: attention over reduced keys, depthwise convolutions in the MLP, upsampled maps."""
    sizes = sized(
        {"hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 256},
        {"hidden_sizes": [16, 32, 64, 128], "decoder_hidden_size": 64, "depths": [1] * 4},
    )
    build = of_transformers("SegformerForSemanticSegmentation", "SegformerConfig", "eager", **sizes)
    return published(
        "hf_segformer",
        build,
        {"pixel_values": values(*sized((8, 3, 512, 512), (2, 3, 64, 64)))},
        num_layers=16,
        items=sized(8, 2),
        unit="images",
    )


def image_net(name: str, full: str, tiny: str, side: int = 224) -> Workload:
    """A classifier of timm."""
    size = sized(side, side)
    draws = {"x": values(sized(32, 1), 3, size, size)}
    return published(name, of_timm(sized(full, tiny)), draws, num_layers=24, items=sized(32, 1), unit="images")


def timm_resnet50() -> Workload:
    """ResNet-50."""
    return image_net("timm_resnet50", "resnet50", "resnet10t")


def timm_convnext() -> Workload:
    """ConvNeXt tiny."""
    return image_net("timm_convnext", "convnext_tiny", "convnext_atto")


def timm_efficientnet() -> Workload:
    """EfficientNet B0."""
    return image_net("timm_efficientnet", "efficientnet_b0", "mobilenetv3_small_050")


def timm_vit() -> Workload:
    """ViT small."""
    return image_net("timm_vit", "vit_small_patch16_224", "vit_tiny_patch16_224")


def timm_swin() -> Workload:
    """Swin tiny."""
    return image_net("timm_swin", "swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224")


def timm_regnet() -> Workload:
    """RegNetY with squeeze and excitation."""
    return image_net("timm_regnet", "regnety_040", "regnety_002")


def timm_maxvit() -> Workload:
    """MaxViT: windows and grids between mobile convolutions."""
    return image_net("timm_maxvit", "maxvit_tiny_tf_224", "maxvit_tiny_tf_224")


def timm_beit() -> Workload:
    """BEiT base: biases of relative positions, scaled branches."""
    return image_net("timm_beit", "beit_base_patch16_224", "deit_tiny_patch16_224")


def timm_mobilenetv4() -> Workload:
    """MobileNet v4 with its multi-query attention."""
    return image_net("timm_mobilenetv4", "mobilenetv4_hybrid_medium", "mobilenetv4_conv_small_050")

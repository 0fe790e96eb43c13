"""Tiny models of the families of Hugging Face, made by `transformers` with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 29,
    "rms_norm_eps": 1e-3,  # large, as theta is small, so that a wrong one shows in a small model
    "rope_theta": 100.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4}),
    "Llama 3.1": (
        "Llama",
        {
            "head_dim": 8,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "Llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "Llama, linear scaling": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "Llama, yarn": (
        "Llama",
        {
            "head_dim": 8,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 3.0,
            },
        },
    ),
    "Qwen 2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen 2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "Qwen 3": ("Qwen3", {"head_dim": 6}),
    "Qwen 3, biases, windows, yarn": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 3.0},
        },
    ),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": (
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 3.0},
        },
    ),
    "Gemma 2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 9,
        },
    ),
    "Gemma 3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 6,
            "head_dim": 8,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 9,
            "rope_local_base_freq": 10.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "Mistral": ("Mistral", {"sliding_window": 5, "head_dim": 6}),
    "Mistral without windows": ("Mistral", {"sliding_window": None}),
    "SmolLM3": ("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "Phi-3": ("Phi3", {"sliding_window": 5}),
    "Phi-3, long context": (
        "Phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.5], "long_factor": [1.5, 3.0]},
        },
    ),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen 3 with experts": (
        "Qwen3Moe",
        {
            "head_dim": 6,
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 10,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "OLMoE": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 3.0,
                "truncate": False,
            },
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "q_lora_rank": 8,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 3.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
        },
    ),
    "DeepSeek-V3, queries without a latent": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None, "rope_interleave": False}),
    "Phi-4, half the width rotates": ("Phi3", {"hidden_size": 32, "partial_rotary_factor": 0.5}),
}
"""Case → the model's class there, and its config besides SIZES."""


def eager() -> dict[str, str]:
    """Return the keys that choose plain attention and plain experts. transformers 4 knows no other experts."""
    import transformers

    experts = {} if transformers.__version__.startswith("4.") else {"experts_implementation": "eager"}
    return {"attn_implementation": "eager", **experts}


def make_model(name: str, **more: Any) -> Any:
    """Make the model of a case in float32, with weights as large as trained ones. more: keys of its config"""
    import transformers

    kind, values = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **values, **more}, **eager())
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            plain_norm = each.endswith("norm.weight") and not kind.startswith("Gemma")
            parameter.normal_(1.0 if plain_norm else 0.0, 0.2 if parameter.dim() == 1 else 0.3)
        for each, buffer in model.named_buffers():
            if each.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    return model


def stored_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients by the names of the files, where each expert's projections are tensors of their own."""
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if mixtral:
            name, path = (each.replace(".mlp.", ".block_sparse_moe.") for each in (name, path))
        for expert, gradient in enumerate(parameter.grad if kind in ("gate_up_proj", "down_proj") else ()):
            if kind == "down_proj":
                found[f"{path}.{expert}.{down}.weight"] = gradient
            else:
                found[f"{path}.{expert}.{gate}.weight"], found[f"{path}.{expert}.{up}.weight"] = gradient.chunk(2)
        found.setdefault(name, parameter.grad)
    return found


def make_model_with_pictures() -> Any:
    """Make a Gemma 3 that sees pictures, too, around the text model of the case."""
    import transformers

    text = make_model("Gemma 3")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=SIZES["vocab_size"] - 1,
        attn_implementation="eager",
    )
    model: Any = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of a few letters with no more tokens than the cases have."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<|endoftext|>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=SIZES["vocab_size"], special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["a cab, a cabbage, a bad egg, a dead bee"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)

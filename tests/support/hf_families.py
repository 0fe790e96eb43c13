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
    "Phi-4, half the width rotates": ("Phi3", {"hidden_size": 32, "partial_rotary_factor": 0.5}),
}
"""Case → the model's class there, and its config besides SIZES."""


def make_model(name: str) -> Any:
    """Make the model of a case in float32, with weights as large as trained ones."""
    import transformers

    kind, values = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **values}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            plain_norm = each.endswith("norm.weight") and not kind.startswith("Gemma")
            parameter.normal_(1.0 if plain_norm else 0.0, 0.2 if parameter.dim() == 1 else 0.3)
    return model


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

"""Models in the layout of Hugging Face: safetensors files, config.json, tokenizer."""

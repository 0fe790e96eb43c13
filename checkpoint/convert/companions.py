"""Names of the files that belong to a tokenizer in a model's folder. Imports nothing."""

from __future__ import annotations

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
COMPANIONS = (SETTINGS, "special_tokens_map.json", "chat_template.jinja")
"""Files beside a tokenizer.json with its special tokens and its chat template."""

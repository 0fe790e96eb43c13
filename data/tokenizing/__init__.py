"""From text to tokens: tokenizers, fill-in-the-middle, the split into training and validation data, and the way back."""

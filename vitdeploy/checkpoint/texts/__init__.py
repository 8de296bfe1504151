"""Zero-shot heads: what is said of them, tokenizers, text towers in their namings, and the head itself."""

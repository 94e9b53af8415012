"""Models: what keepkv must know of a family, loading one, and the embedded SmolLM2."""

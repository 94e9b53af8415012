"""The plugin for vLLM: its entry point, its page format, its attention backends."""

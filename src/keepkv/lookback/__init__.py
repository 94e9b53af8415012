"""Looking back: a compact cache understands a text, and what a question needs word for word comes back."""

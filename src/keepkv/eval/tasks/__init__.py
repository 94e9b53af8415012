"""Tasks: what a model is asked in an evaluation. `registry` lists them."""

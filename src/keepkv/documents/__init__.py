"""Documents: texts that were compiled once into compact caches, as values, as .keep files, and in a store."""

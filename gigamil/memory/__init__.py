"""Same result, less memory: which graphs are kept for backward, and replay of the others."""

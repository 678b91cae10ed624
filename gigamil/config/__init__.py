"""Configuration: `schema` declares it, `load` reads it."""

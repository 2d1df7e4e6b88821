"""System calls that Python lacks: thin, typed, without policy."""

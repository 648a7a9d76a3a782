"""One DuckDB file that knows every capture, every example in it, and which students learnt from it."""

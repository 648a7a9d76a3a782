"""Two tokenizers and heads compared as loaded: a verdict with evidence, never by size alone."""

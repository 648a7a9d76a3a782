"""The teacher sees every row once; what it thought of each next token is kept, sparsely."""

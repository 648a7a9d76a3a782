"""The shell: what exists, what it depends on, when it runs. No tensor code, SQL or file format here.

`pipeline` says what each asset would make now; `assets`, `checks` and `automation` give it to
Dagster; `bring_up_to_date` is what `distill run` and the nightly schedule do.
"""

"""A student trained against captured distributions, or, as the control, against the tokens alone."""

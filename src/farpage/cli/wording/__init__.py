"""How the documents of the control APIs read on a terminal; one module per noun."""

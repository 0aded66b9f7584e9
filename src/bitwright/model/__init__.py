"""Models: found blocks, linears, and who shares an input. transformers' own module code runs; no model is written anew."""

"""Measure: an evaluator takes ``tokens -> logits``, so every layout and every engine is measured by the same code."""

"""The vocabulary: schemes, quantized tensors, statistics, plan records. Pure: no I/O, no model, no device choice."""

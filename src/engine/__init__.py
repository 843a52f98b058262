"""Fast sampling and gradients: decoders, packed log-probs, compiled CPU kernels, and memory planning."""

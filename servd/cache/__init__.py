"""Which KV block holds which tokens: allocation, sharing, reuse, eviction. Knows nothing of tensors or bytes."""

"""Layer 2: from rows to batches. Imports datasets, and receives the tokenizer from outside."""

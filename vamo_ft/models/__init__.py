"""Layer 2: models from transformers and adapters from peft."""

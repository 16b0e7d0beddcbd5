"""vamo-ft: fine-tune Hugging Face language models from one YAML file, with VAMO, MeZO and their relatives."""

__all__ = ["__version__"]

__version__ = "0.1.0"

"""Layer 2: models from transformers and adapters from peft."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it warns of faster kernels that it lacks

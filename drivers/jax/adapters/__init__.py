"""LoRA adapters: several in a batch (``lora``, ``grouped``), loaded and dropped while a model runs."""

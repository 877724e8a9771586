import warnings

# All supported versions of transformers call it gradient checkpointing; newer ones say that it has another name.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)

import warnings

# Newer transformers warn that gradient_checkpointing is renamed; every supported version accepts the old name.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)

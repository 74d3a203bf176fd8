"""File names of a Hugging Face model repository."""

CONFIG = "config.json"
#: Which shard has which tensor; absent where all tensors are in one file.
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

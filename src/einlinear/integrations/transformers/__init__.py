"""transformers models with structured layers: `save_pretrained` and `from_pretrained` know them, and LoRA does.

Nothing has to be called: `import einlinear` registers what transformers needs as soon as that is imported. config.json
then says which layers are structured, beside the weights in safetensors.
"""

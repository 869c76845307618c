"""Weights: reading GGUF and safetensors, converting to the decoder's parameters, keeping the result.

``source`` opens what a user names; ``convert`` maps its tensors to parameters by a family's rules and
refuses any that is missing, cut off, mis-shaped or not finite; ``checkpoint`` keeps the converted weights
with Orbax, so that the next start restores them instead.
"""

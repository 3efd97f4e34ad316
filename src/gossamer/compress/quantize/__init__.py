"""Quantization ahead of serving: from floats to the integers that a checkpoint stores.

rounding.py, hessian.py and gptq_weights.py are maths on tensors; rtn.py, gptq.py and mixed_bits.py are steps
of a recipe, over the life they share (life.py).
"""

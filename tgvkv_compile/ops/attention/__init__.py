"""Attention with its log-sum-exp, its masks, and rows of it worked out in float32."""

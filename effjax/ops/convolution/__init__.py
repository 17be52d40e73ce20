"""Convolutions along rows of documents: short ones, over the latest tokens, and long ones.

All are causal and depthwise: each channel has its own filter, and none looks ahead.
"""

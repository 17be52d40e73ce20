"""Mixtures of experts: a router sends each token through a few of many feed-forward networks.

`switch` routes to one expert; `naive` is the loop it is compared with; `accounting` has the
closed-form FLOPs of both of its forms.
"""

"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * scale, forward and backward.

With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy * scale:

    dx = r (g - n mean(g n)),        dscale = sum over rows of dy n.

The backward kernel reads x again and recomputes r, which costs less than storing it. `gpu` and
`tpu` have a kernel per direction, `limits` says what they take, `cost` counts what they do.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
"""

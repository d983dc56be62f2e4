"""From a trained network to what is put in production, and proof that it computes the same.

One copy has two names: `python -m export.verify` in a checkout, `python -m x3d_tf.export.verify` where it is installed.
"""

"""Export of trained networks for deployment, and verification of the exported artefacts.

The package has two names: `export` in a checkout (`python -m export.verify`), and `x3d_tf.export` when it is installed
(`python -m x3d_tf.export.verify`).
"""

"""From a trained network to what is put in production, and proof that it computes the same: `x3d_tf.export`."""

"""Data pipeline: builds records from videos, and reads clips from records with tf.data."""

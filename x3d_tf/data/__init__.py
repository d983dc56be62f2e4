"""From video files to clips: records, their manifest and the tf.data pipelines that read them."""

"""TF Serving: files of the container image, and a client for videos."""
